"""Which layer may compute a module: torch.nn's by their class, others by what they compute."""

import functools
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from torch import nn

import fastlm.nn
from fastlm.acceleration.activations import match_gated, match_gelu
from fastlm.acceleration.matching import Match, Refusal, plain_attributes
from fastlm.acceleration.norms import match_norm
from fastlm.acceleration.transformer_layers import DecoderLayer, EncoderLayer, match_transformer_layer

TORCH_LAYERS: dict[type[nn.Module], tuple[str, type[nn.Module]]] = {
    nn.LayerNorm: ("norms", fastlm.nn.LayerNorm),
    nn.RMSNorm: ("norms", fastlm.nn.RMSNorm),
    nn.GELU: ("activations", fastlm.nn.GELU),
    nn.MultiheadAttention: ("attention", fastlm.nn.MultiheadAttention),
    nn.CrossEntropyLoss: ("loss", fastlm.nn.CrossEntropyLoss),
    nn.TransformerEncoderLayer: ("norms", EncoderLayer),
    nn.TransformerDecoderLayer: ("norms", DecoderLayer),
}
SEARCHES: tuple[tuple[str, Callable[[nn.Module], Match | Refusal | None]], ...] = (
    ("norms", match_norm),
    ("activations", match_gelu),
    ("activations", match_gated),
)


def searches(module: nn.Module) -> Iterator[tuple[str, Any, Callable[[nn.Module], Match | Refusal | None]]]:
    """(family, key, search) of every search that may find something; modules with one key get one answer."""
    for theirs, (family, ours) in TORCH_LAYERS.items():
        if isinstance(module, theirs):
            if type(module).forward is theirs.forward and not isinstance(module, ours):
                match = match_transformer_layer if ours in (EncoderLayer, DecoderLayer) else _match_torch_layer
                yield family, type(module), functools.partial(match, ours)
            return
    facts = _facts(module)
    for family, search in SEARCHES:
        yield family, (search, facts), search
    if hasattr(module, "get_output_embeddings"):
        from fastlm.acceleration.causal_lm_loss import (
            match_loss,
        )  # transformers is imported by whoever has such a model

        yield "loss", (match_loss, id(module)), match_loss


def _match_torch_layer(ours: type[nn.Module], module: nn.Module) -> Match:
    return Match(ours, None, f"fastlm.nn.{ours.__name__}")


def _facts(module: nn.Module) -> Hashable:
    """What decides what a module of this class computes, but for the numbers in its tensors."""
    shapes = tuple((name, None if p is None else tuple(p.shape)) for name, p in module._parameters.items())
    children = tuple((name, type(child), _facts(child)) for name, child in module._modules.items() if child is not None)
    return type(module), tuple(plain_attributes(module).items()), shapes, children if len(children) < 8 else id(module)
