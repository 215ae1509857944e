"""A swapped module: its class is a subclass of the class that it had, with fastlm's forward; nothing else changes.

So parameters, buffers, hooks, the training flag and isinstance stay as they were, and so do repr, state_dict and the
name of the class, which Hugging Face reads to wrap and to split models.
"""

import functools
import inspect
import sys
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

ATTENTION_BEFORE = "_fastlm_attention_before"  # the attribute of a Hugging Face model for what restore puts back


class Swapped(nn.Module):
    """What every class that stands in for another has."""

    original: ClassVar[type[nn.Module]]  # what restore puts back
    layer: ClassVar[type[nn.Module]]  # whose forward runs
    form: ClassVar[Any]  # what the layer has to know of the original: names of attributes, kind of activation

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Classes made at run time cannot be looked up by name; what they are made of can."""
        reduced: Any = super().__reduce_ex__(protocol)
        function, arguments, *rest = reduced
        if arguments[:1] == (type(self),):
            function, arguments = new_swapped, (self.original, self.layer, self.form, *arguments[1:])
        return function, arguments, *rest


@functools.cache
def swapped_class(original: Any, layer: type[nn.Module], form: Any) -> Any:
    """The class of modules of class original that run layer's forward."""
    facts = {"original": original, "layer": layer, "form": form}
    same = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    made = layer.forward_of(original.forward, form) if hasattr(layer, "forward_of") else layer.forward
    forward = {"forward": _with_signature_of(original.forward, made)}
    return type(original.__name__, (Swapped, layer, original), {**facts, **same, **forward})


def _with_signature_of(original: Any, forward: Any) -> Any:
    """forward as a function of its own that shows the arguments of original, by which trainers choose what to pass."""
    shown = FunctionType(
        forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
    )
    shown.__kwdefaults__, shown.__doc__ = forward.__kwdefaults__, original.__doc__
    shown.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return shown


def new_swapped(original: type[nn.Module], layer: type[nn.Module], form: Any, *arguments: Any) -> nn.Module:
    """An empty module of such a class, whose attributes pickle or deepcopy set next."""
    if "transformers" in sys.modules:  # a model in another process than the one that accelerated it
        from fastlm.acceleration.hugging_face_attention import register

        register()
    made = swapped_class(original, layer, form)  # type: ignore[arg-type]
    return made.__new__(made, *arguments)


def swap(module: nn.Module, layer: type[nn.Module], form: Any) -> None:
    module.__class__ = swapped_class(type(module), layer, form)  # type: ignore[arg-type]


def is_swapped(module: nn.Module) -> bool:
    """Whether the class of module is one that swap made, not one that somebody derived from such a class."""
    return "original" in vars(type(module)) and isinstance(module, Swapped)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of module, or what it was before the swap."""
    return module.original if isinstance(module, Swapped) else type(module)


def swap_back(module: nn.Module) -> None:
    assert isinstance(module, Swapped), "only a swapped module knows its original class"
    module.__class__ = module.original  # type: ignore[assignment]


def obstacle(module: nn.Module) -> str | None:
    """Why a module cannot be swapped, whatever it computes."""
    if isinstance(module, Swapped):
        return "its class was derived from a swapped one, as fully_shard does; restore the model before that"
    if "forward" in vars(module):
        return "its forward was replaced on the instance, as dispatching hooks do"
    if is_parametrized(module):
        return "it is parametrized; accelerate the model before that"
    if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
        return "it is sharded by fully_shard; accelerate the model before that"
    tensors = [*module._parameters.values(), *module._buffers.values()]
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in (nn.Parameter, nn.Buffer, torch.Tensor):
            return f"it holds a {type(tensor).__name__}"
        if tensor.is_meta:
            return "it lies on the meta device; materialise it first"
        if tensor.is_quantized or not (tensor.is_floating_point() or tensor.dtype in (torch.bool, torch.int64)):
            return f"it holds {tensor.dtype}"
    return None
