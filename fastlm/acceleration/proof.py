"""Whether two functions are the same, tried on random input: values and every gradient, in float32 on a CPU.

A trial runs a copy of the module in question that shares no parameter with it and has small ones of its own.
"""

import contextlib
import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.acceleration.matching import HOOKS

TOLERANCE = 1e-4  # of the largest value: between float32's rounding, 1e-7, and what another formula differs by
CONTAINERS = (list, dict, set, deque)  # which a trial has copies of
SCALES = (1.0, 30.0, 1e4, 1e-2, 1e-3, 1e-4, 1e-6)  # of the rows tried: small ones show an eps, large ones a clamp


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def rows(C: int) -> Tensor:
    """(B, T, C) to try a layer on: a row of each scale, and each shifted so that a mean counts."""
    generator = torch.Generator().manual_seed(1)
    x = random(generator, 2, len(SCALES), C)
    return (x + torch.tensor([0.0, 0.7])[:, None, None]) * torch.tensor(SCALES)[:, None]


def trial_copy(
    module: nn.Module,
    parameters: Mapping[str, Tensor | None] | None = None,
    children: Mapping[str, nn.Module] | None = None,
) -> nn.Module:
    """A copy of module that has these parameters and children instead of its own, containers apart, and no hooks.

    Linear layers among the children double their result when they are called: code that reads their weights alone would
    miss an adapter, and shows.
    """
    trial = copy.copy(module)
    for name, value in vars(trial).items():
        if isinstance(value, CONTAINERS):
            trial.__dict__[name] = copy.copy(value)
    trial.__dict__.update(_parameters=dict(parameters or {}), _modules=dict(children or {}), _buffers={})
    for name in HOOKS:
        trial.__dict__[name] = {}
    for child in trial.children():
        if isinstance(child, nn.Linear) and not child._forward_hooks:
            child.register_forward_hook(lambda layer, given, result: 2 * result)
    for prefix, tried in (("", trial), *((f"{name}.", child) for name, child in trial.named_children())):
        _note_reads(tried, prefix)
    return trial


def unheard(module: nn.Module) -> nn.Module:
    """A deep copy that nobody hears: what a trial does to it stays with it."""
    copied = copy.deepcopy(module)
    for part in copied.modules():
        for name in HOOKS:
            getattr(part, name).clear()
    return copied


# What a module looks up

_names_read: ContextVar[set[str] | None] = ContextVar("names_read", default=None)


@contextlib.contextmanager
def names_read() -> Iterator[set[str]]:
    """The names of all attributes that modules under trial and their children look up meanwhile."""
    names: set[str] = set()
    token = _names_read.set(names)
    try:
        yield names
    finally:
        _names_read.reset(token)


def _note_reads(trial: nn.Module, prefix: str) -> None:
    names, original = _names_read.get(), type(trial)
    if names is None or "noting" in vars(original):
        return

    def look_up(self: nn.Module, name: str) -> Any:
        names.add(prefix + name)
        return original.__getattribute__(self, name)

    noting = {"__getattribute__": look_up, "__module__": original.__module__, "noting": True}
    with contextlib.suppress(Exception):  # a class may object to being derived from: no swap derives from it
        trial.__class__ = type(original.__name__, (original,), noting)


# Whether two functions are the same


def agree(ours: Callable[..., Tensor], trial: nn.Module, x: Tensor, parameters: list[Tensor]) -> bool:
    """Whether ours gives the values and gradients that trial gives for x and parameters.

    Tried in training, where a dropout that trial calls as a function would show, and in evaluation, with gradients and
    without. Raises SideEffect if trial changes.
    """
    found = values_and_gradients(ours, x, parameters)
    for training in (True, False):
        trial.train(training)
        before = _contents(trial)
        expected = values_and_gradients(trial.forward, x, parameters)
        _refuse_changes(before, _contents(trial))
        if not all(is_close(a, b) for a, b in zip(found, expected, strict=True)):
            return False
    with torch.no_grad():
        return is_close(found[0], trial.forward(x))


class SideEffect(Exception):  # noqa: N818 (no error of the module)
    """A forward changes its module, which a swapped layer would not."""


def _contents(module: nn.Module) -> dict[str, list[Any]]:
    """Every object that a module keeps, also in its containers."""
    contents = {name: [value] for name, value in vars(module).items() if name != "training"}
    for kept in contents.values():
        if isinstance(kept[0], CONTAINERS):
            kept += [*kept[0]]
        if isinstance(kept[0], dict):
            kept += kept[0].values()
    return contents


def _refuse_changes(before: dict[str, list[Any]], after: dict[str, list[Any]]) -> None:
    for name in before | after:
        a, b = before.get(name), after.get(name)
        if a is None or b is None or len(a) != len(b) or any(x is not y for x, y in zip(a, b, strict=True)):
            raise SideEffect(f"its forward changes its attribute {name}")


def values_and_gradients(function: Callable[..., Tensor], x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """function(x), and its gradients by x and the parameters for one upstream gradient."""
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        y = function(x)
        if not isinstance(y, Tensor) or y.dtype != torch.float32 or not y.requires_grad:
            raise ValueError("it gives no float32 tensor with a gradient")
        upstream = random(torch.Generator().manual_seed(2), *y.shape)
        gradients = torch.autograd.grad(y, [x, *parameters], upstream, allow_unused=True)
    return [y.detach(), *(torch.zeros(()) if gradient is None else gradient for gradient in gradients)]


def is_close(a: Tensor, b: Tensor) -> bool:
    """Row by row, so that rows of small numbers count as much as those of large ones."""
    if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
        return False
    largest = b.abs().amax(-1, keepdim=True) if b.dim() > 1 else b.abs().amax()
    return bool(((a - b).abs() <= TOLERANCE * largest + 1e-12).all())
