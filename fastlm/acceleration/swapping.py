"""accelerate, restore and accelerated: the layers of a model swapped for fastlm's in place, and what became of each."""

import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from fastlm.acceleration.matching import FAMILIES, OURS, Match, Refusal, Row, kept_by
from fastlm.acceleration.proof import names_read
from fastlm.acceleration.swapped_module import (
    ATTENTION_BEFORE,
    Swapped,
    is_swapped,
    obstacle,
    swap,
    swap_back,
)

_LOCK = threading.RLock()
_REPORT = f"{OURS}report"  # the attribute of a module that holds its Report


class Report(NamedTuple):
    """What accelerate made of a model; str() is a table."""

    rows: tuple[Row, ...]

    @property
    def swapped(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.swapped)

    @property
    def skipped(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.swapped)

    def __str__(self) -> str:
        """Layers of one class with one outcome in one line, with how many they are."""
        if not self.rows:
            return (
                "fastlm: nothing is swapped: accelerate was not called on this model, or found no layer that it knows"
            )
        groups: dict[tuple[Any, ...], list[str]] = {}
        for row in self.rows:
            groups.setdefault((not row.swapped, row.family, row.module, row.detail), []).append(row.name or "the model")
        lines = [f"fastlm: {len(self.swapped)} of {len(self.rows)} layers swapped"]
        for (is_left, family, module, detail), names in groups.items():
            where = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
            lines.append(f"  {'not swapped' if is_left else 'swapped':11}  {family:11} {module} ({where}): {detail}")
        return "\n".join(lines)


def accelerate(
    model: nn.Module,
    *,
    attention: bool = True,
    norms: bool = True,
    activations: bool = True,
    loss: bool = True,
    verbose: bool = False,
) -> nn.Module:
    """Swap the layers of model, in place, for fastlm's that compute the same, and return it.

    model        any torch.nn.Module. Of a Hugging Face model attention and the loss without logits come too
    attention    torch.nn.MultiheadAttention; attn_implementation "fastlm" of a Hugging Face model
    norms        LayerNorm and RMSNorm under any name, also with the weight 1 + parameter; torch.nn's encoder and
                 decoder layers
    activations  GELU under any name, feed-forward blocks gated by SiLU or GELU
    loss         torch.nn.CrossEntropyLoss; a Hugging Face model's loss by linear_cross_entropy: in training the output
                 then has no logits, unless it is called with skip_logits=False
    verbose      print the report, which accelerated(model) returns

    Parameters, buffers, hooks and names stay what they were: optimisers, state_dict, weight tying and adapters go on.
    A second call swaps what is new. restore(model) takes everything back.

    Raises TypeError if model is no torch.nn.Module, or a switch no bool.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model is of type {type(model).__name__}, expected a torch.nn.Module")
    wanted = dict(zip(FAMILIES, (attention, norms, activations, loss), strict=True))
    for name, switch in {**wanted, "verbose": verbose}.items():
        if not isinstance(switch, bool):
            raise TypeError(f"accelerate: {name} is {switch!r}, expected True or False")
    given, model = model, uncompiled(model)
    with _LOCK:
        rows = [row for row in accelerated(model).rows if row.swapped]
        rows += _swap_layers(model, wanted)
        if attention and "transformers" in sys.modules:
            from fastlm.acceleration.hugging_face_attention import switch_on
            from fastlm.acceleration.rotary import swap_rotations

            rows += swap_rotations(model)
            rows += switch_on(model)
        _report(model, rows)
    if verbose:
        print(accelerated(model))
    return given


def _report(model: nn.Module, rows: Iterable[Row]) -> None:
    """Leave with each module of model what became of it, the last row of each family: a copy, or a part that moves to
    another model, takes it along.
    """
    of_module: dict[str, dict[str, Row]] = {}
    for row in rows:
        of_module.setdefault(row.name, {})[row.family] = row._replace(name="")
    for name, module in model.named_modules():
        module.__dict__.pop(_REPORT, None)
        if name in of_module:
            module.__dict__[_REPORT] = Report(tuple(of_module[name].values()))


def accelerated(model: nn.Module) -> Report:
    """What accelerate made of each layer of model; empty if of none."""
    rows = []
    for name, module in uncompiled(model).named_modules():
        report = module.__dict__.get(_REPORT, Report(()))
        rows += [row._replace(name=f"{name}.{row.name}".strip(".")) for row in report.rows]
    return Report(tuple(rows))


def uncompiled(model: nn.Module) -> nn.Module:
    """What torch.compile(model) wraps, or model itself."""
    return getattr(model, "_orig_mod", model)


def restore(model: nn.Module) -> nn.Module:
    """Take back what accelerate did to model, which then is as it was, and return it.

    Raises RuntimeError if a class was derived from a swapped one meanwhile, as fully_shard does, or a swapped layer was
    given a forward of its own, which may call ours.
    """
    given, model = model, uncompiled(model)
    with _LOCK:
        for name, module in model.named_modules():
            if isinstance(module, Swapped) and (not is_swapped(module) or "forward" in vars(module)):
                raise RuntimeError(f"restore: {name or 'the model'}: {obstacle(module)}")
        for module in model.modules():
            if is_swapped(module):
                swap_back(module)
            module.__dict__.pop(_REPORT, None)
            if (implementation := module.__dict__.pop(ATTENTION_BEFORE, None)) is not None:
                module.config._attn_implementation = implementation  # type: ignore[union-attr]
    return given


# One layer


def _swap_layers(model: nn.Module, wanted: dict[str, bool]) -> Iterator[Row]:
    """Swap what can be, and say of each layer that belongs to a family what became of it."""
    found: dict[Any, Match | Refusal | None] = {}  # layers of one class and shape are tried once
    for name, module in list(model.named_modules()):
        if is_swapped(module):
            continue
        family, outcome = _outcome(module, found)
        if outcome is None:
            continue
        row = Row(name, type(module).__name__, family, False, "")
        if isinstance(outcome, Refusal):
            yield row._replace(detail=outcome.reason)
        elif (reason := obstacle(module)) is not None:
            yield row._replace(detail=reason)
        elif not wanted[family]:
            yield row._replace(detail=f"{family}=False")
        else:
            try:
                swap(module, outcome.layer, outcome.form, outcome.kept)
            except Exception as error:  # a class may object to being derived from
                yield row._replace(detail=f"its class cannot be derived from: {error}")
                continue
            for part, layer in outcome.parts:
                if not is_swapped(part):
                    swap(part, layer, None)
            yield row._replace(swapped=True, detail=outcome.name)


def _outcome(module: nn.Module, found: dict[Any, Match | Refusal | None]) -> tuple[str, Match | Refusal | None]:
    """(family, what the searches find for a module): the first match, else the first refusal."""
    from fastlm.acceleration.layers import searches  # which imports Triton: not before it is needed

    refused: tuple[str, Match | Refusal | None] = ("", None)
    for family, key, match in searches(module):
        if key not in found:
            with torch.random.fork_rng(devices=[]), names_read() as names:  # trials run on a CPU, and may draw
                tried = match(module)
            if isinstance(tried, Match):
                tried = tried._replace(kept=kept_by(module, names.difference(tried.reads)))
            found[key] = tried
        outcome = found[key]
        if isinstance(outcome, Match):
            return family, outcome
        if refused[1] is None:
            refused = family, outcome
    return refused
