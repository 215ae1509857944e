"""Registers raw ops with torch.library, and takes gradients that autograd can differentiate again.

A raw op is a custom op, a kernel behind torch.ops.fastlm.<name>: torch.compile keeps it whole, torch.library.opcheck
checks it. An autograd.Function of the op's file joins the raw forward and backward into one differentiable function.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("fastlm", "FRAGMENT")
KERNEL_DEVICES = ("CPU", "CUDA")
PLAIN_TYPES = frozenset((bool, int, float, str, tuple, list, torch.Size, torch.dtype))  # of arguments without tensors


def register(
    schema: str, implementation: Callable[..., Any], fake: Callable[..., Any], keys: Sequence[str] = KERNEL_DEVICES
) -> Any:
    """Define an op in Python, with one implementation for these dispatch keys, and return what calls it.

    schema          name, arguments and results, in the language of native_functions.yaml
    implementation  computes the results; with other keys, C++ of a library may take its place on a device
    fake            the results, uninitialised: all that a traced program needs to know
    """
    name = LIBRARY.define(schema)
    for key in keys:
        LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"fastlm::{name}", fake, lib=LIBRARY)
    overload = getattr(torch.ops.fastlm, name).default
    return RawOp(overload, implementation) if keys is KERNEL_DEVICES else overload


class RawOp:
    """Calls a raw op, or at once its implementation where the dispatcher would do no more than that.

    The way through PyTorch's dispatcher to an op written in Python and back costs the host more than a launch.
    """

    def __init__(self, overload: Any, implementation: Callable[..., Any]) -> None:
        self.overload, self.implementation = overload, implementation

    def __call__(self, *args: Any, **hints: Any) -> Any:
        """hints: objects that spare the implementation work and change no result; the dispatcher takes none."""
        # Dynamo traces this, and follows none of the questions after the first.
        if torch.compiler.is_compiling() or is_observed() or not is_ordinary_call(args):
            return self.overload(*args)
        return self.implementation(*args, **hints)


def is_observed() -> bool:
    """Whether anything sees, changes or replaces the ops that PyTorch dispatches: a mode, a transform, a profiler."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
    )


def is_ordinary_call(args: Sequence[Any]) -> bool:
    """Whether all tensors among the arguments, the first of which is one, are what their memory says."""
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is torch.nn.Parameter:
            if arg.is_neg() or arg._is_zerotensor() or torch._C._functorch.is_legacy_batchedtensor(arg):
                return False
        elif arg is not None and kind not in PLAIN_TYPES:
            return False
    return args[0].is_cuda or args[0].is_cpu


class NoContext:
    """Stands for the ctx of an autograd.Function where nothing will ask for its gradient."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply(*args); where gradients are off its forward alone, without what autograd costs the host."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function.apply(*args)
    return function.forward(NoContext(), *args)


def is_double_backward() -> bool:
    """Whether the backward that runs is to be differentiated again (create_graph=True).

    A raw op has no gradient of its own: without this question a second derivative would silently be zero.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def differentiable_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    upstream: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of function(*inputs) for the inputs that need one, which autograd can differentiate again.

    upstream    a gradient for each output of the function; None for an output that nobody used
    """
    # Fresh views: the gradient of one input must not pass through another that was computed from it, or is it.
    aliases = [None if x is None else x.view_as(x) for x in inputs]
    sources = [x for x, needed in zip(aliases, needs, strict=True) if needed and x is not None]
    results = function(*aliases)
    outputs = results if isinstance(results, tuple) else (results,)
    used = [(y, dy.to(y.dtype)) for y, dy in zip(outputs, upstream, strict=True) if dy is not None]
    ys, dys = zip(*used, strict=True)
    found = iter(torch.autograd.grad(ys, sources, dys, create_graph=True, allow_unused=True))
    return [next(found) if needed and x is not None else None for x, needed in zip(aliases, needs, strict=True)]
