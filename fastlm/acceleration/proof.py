"""Whether two functions are the same, tried on random input: values and every gradient, in float32 on a CPU.

A trial runs a copy of the module in question that shares no parameter with it and has small ones of its own.
"""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fastlm.acceleration.matching import HOOKS

TOLERANCE = 1e-4  # of the largest value: between float32's rounding, 1e-7, and what another formula differs by
SCALES = (1.0, 30.0, 1e-2, 1e-3, 1e-4)  # of the rows tried: small ones show the eps of a norm, large ones a clamp


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def rows(C: int) -> Tensor:
    """(B, T, C) to try a layer on: a row of each scale, and each shifted so that a mean counts."""
    generator = torch.Generator().manual_seed(1)
    x = random(generator, 2, len(SCALES), C)
    return (x + torch.tensor([0.0, 0.7])[:, None, None]) * torch.tensor(SCALES)[:, None]


def trial_copy(
    module: nn.Module,
    parameters: Mapping[str, Tensor] | None = None,
    children: Mapping[str, nn.Module] | None = None,
) -> nn.Module:
    """A copy of module that has these parameters and children instead of its own, and no hooks."""
    trial = copy.copy(module)
    trial.__dict__.update(_parameters=dict(parameters or {}), _modules=dict(children or {}), _buffers={})
    for name in HOOKS:
        trial.__dict__[name] = {}
    return trial


def unheard(module: nn.Module) -> nn.Module:
    """A deep copy that nobody hears: what a trial does to it stays with it."""
    copied = copy.deepcopy(module)
    for part in copied.modules():
        for name in HOOKS:
            getattr(part, name).clear()
    return copied


def agree(ours: Callable[..., Tensor], trial: nn.Module, x: Tensor, parameters: list[Tensor]) -> bool:
    """Whether ours gives the values and gradients that trial gives for x and parameters, in training and evaluation.

    In training, a dropout that trial calls as a function would show.
    """
    found = _values_and_gradients(ours, x, parameters)
    for training in (True, False):
        trial.train(training)
        expected = _values_and_gradients(trial.forward, x, parameters)
        if not all(_is_close(a, b) for a, b in zip(found, expected, strict=True)):
            return False
    return True


def _values_and_gradients(function: Callable[..., Tensor], x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        y = function(x)
        if not isinstance(y, Tensor) or y.dtype != torch.float32 or not y.requires_grad:
            raise ValueError("it gives no float32 tensor with a gradient")
        upstream = random(torch.Generator().manual_seed(2), *y.shape)
        gradients = torch.autograd.grad(y, [x, *parameters], upstream, allow_unused=True)
    return [y.detach(), *(torch.zeros(()) if gradient is None else gradient for gradient in gradients)]


def _is_close(a: Tensor, b: Tensor) -> bool:
    """Row by row, so that rows of small numbers count as much as those of large ones."""
    if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
        return False
    largest = b.abs().amax(-1, keepdim=True) if b.dim() > 1 else b.abs().amax()
    return bool(((a - b).abs() <= TOLERANCE * largest + 1e-12).all())
