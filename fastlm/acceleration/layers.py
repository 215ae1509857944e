"""Which layer may compute a module: torch.nn's by their class, others by what they compute."""

import functools
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

import fastlm.nn
from fastlm.acceleration.activations import match_gated, match_gelu
from fastlm.acceleration.matching import Match, Refusal, has_of_its_own, is_pytorchs, own_attributes
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
LARGEST_BLOCK = 8  # children of what may be a feed-forward block
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
                match = match_transformer_layer if ours in (EncoderLayer, DecoderLayer) else match_torch_layer
                yield family, (type(module), *vars(module)), functools.partial(match, ours)
            return
    if any(p is not None and is_lazy(p) for p in module._parameters.values()):
        return
    facts = _facts(module)
    for family, search in SEARCHES:
        yield family, (search, facts), search
    if hasattr(module, "get_output_embeddings"):
        from fastlm.acceleration.loss_without_logits import (
            match_loss,
        )  # transformers is imported by whoever has such a model

        yield "loss", (match_loss, id(module)), match_loss


def match_torch_layer(layer: type[nn.Module], module: nn.Module) -> Match | Refusal:
    theirs = layer.__bases__[-1]
    if not is_pytorchs(theirs, "forward"):
        return Refusal(f"the forward of torch.nn.{theirs.__name__} is not PyTorch's")
    for name in vars(layer):
        if name != "forward" and not name.startswith("__") and has_of_its_own(module, theirs, name):
            return Refusal(f"it has a {name} of its own, which fastlm.nn.{layer.__name__} understands otherwise")
    return Match(layer, None, f"fastlm.nn.{layer.__name__}")


def _facts(module: nn.Module) -> Hashable:
    """What decides what a module computes, but for the numbers in its parameters; a block of many children is alone."""
    if len(module._modules) >= LARGEST_BLOCK or module._buffers:
        return id(module)
    shapes = tuple((name, _shape(parameter)) for name, parameter in module._parameters.items())
    attributes = tuple((name, _fact(value)) for name, value in own_attributes(module).items())
    children = tuple((name, type(child), _leaf_facts(child)) for name, child in module.named_children())
    return type(module), attributes, shapes, children


def _shape(parameter: nn.Parameter | None) -> tuple[int, ...] | None:
    return None if parameter is None or is_lazy(parameter) else tuple(parameter.shape)


def _leaf_facts(child: nn.Module) -> Hashable:
    return id(child) if child._modules else _facts(child)


def _fact(value: Any) -> Hashable:
    """Equal for values that are the same to any code; of what is no number or word only for the same object."""
    if isinstance(value, tuple):
        return tuple, tuple(map(_fact, value))
    return type(value), value if type(value) in (int, float, str, bool, type(None), torch.dtype) else id(value)
