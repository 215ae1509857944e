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
from torch.fx import GraphModule
from torch.nn.utils.parametrize import is_parametrized

from fastlm.acceleration.matching import Kept, has_of_its_own

ATTENTION_BEFORE = "_fastlm_attention_before"  # the attribute of a Hugging Face model for what restore puts back


class Swapped(nn.Module):
    """What every class that stands in for another has."""

    original: ClassVar[type[nn.Module]]  # what restore puts back
    layer: ClassVar[type[nn.Module]]  # whose forward runs
    form: ClassVar[Any]  # what the layer has to know of the original: names of attributes, kind of activation
    kept: ClassVar[Kept]  # the original's code runs while the module keeps anything else

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Classes made at run time cannot be looked up by name; what they are made of can."""
        reduced: Any = super().__reduce_ex__(protocol)
        function, arguments, *rest = reduced
        if arguments[:1] == (type(self),):
            function, arguments = new_swapped, (self.original, self.layer, self.form, self.kept, *arguments[1:])
        return function, arguments, *rest

    def __prepare_scriptable__(self) -> None:
        """torch.jit.script asks every module for what it may compile."""
        raise RuntimeError(
            f"torch.jit.script: {type(self).__name__} is swapped by fastlm.accelerate, expected a module of its own "
            "code; call fastlm.restore(model) first, or use torch.compile or torch.jit.trace"
        )


@functools.cache
def swapped_class(original: Any, layer: type[nn.Module], form: Any, kept: Kept) -> Any:
    """The class of modules of class original that run layer's forward."""
    facts = {"original": original, "layer": layer, "form": form, "kept": kept}
    same = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    if hasattr(layer, "forward_of"):
        forward = layer.forward_of(original.forward, form)
    else:
        forward = _while_kept(original, layer, kept) if kept else layer.forward
    shown = {"forward": _with_signature_of(original.forward, forward)}
    return type(original.__name__, (Swapped, layer, original), {**facts, **same, **shown})


def _while_kept(original: Any, layer: Any, kept: Kept) -> Any:
    """The forward of layer, and of original while the module keeps something else."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_kept = all(_looked_up(self, name) == value for name, value in kept)
        return (layer if is_kept else original).forward(self, *args, **kwargs)

    return forward


def _looked_up(module: Any, name: str) -> Any:
    """The attribute of a module, or of a child as in "act.inplace"; None if it is gone."""
    for part in name.split("."):
        module = getattr(module, part, None)
    return module


def _with_signature_of(original: Any, forward: Any) -> Any:
    """forward as a function of its own that shows the arguments of original, by which trainers choose what to pass."""
    shown = FunctionType(
        forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
    )
    shown.__kwdefaults__, shown.__doc__ = forward.__kwdefaults__, original.__doc__
    shown.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return shown


def new_swapped(original: type[nn.Module], layer: type[nn.Module], form: Any, kept: Kept, *arguments: Any) -> nn.Module:
    """An empty module of such a class, whose attributes pickle or deepcopy set next."""
    if "transformers" in sys.modules:  # a model in another process than the one that accelerated it
        from fastlm.acceleration.hugging_face_attention import register

        register()
    made = swapped_class(original, layer, form, kept)  # type: ignore[arg-type]
    return made.__new__(made, *arguments)


def swap(module: nn.Module, layer: type[nn.Module], form: Any, kept: Kept = ()) -> None:
    module.__class__ = swapped_class(type(module), layer, form, kept)  # type: ignore[arg-type]


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
    if is_swapped(module):
        return "its forward was replaced on the instance after accelerate, and may call ours; put it back first"
    if isinstance(module, Swapped):
        by = "fully_shard or a parametrization"
        return f"its class was derived from a swapped one, as by {by}; restore the model before that"
    for name in Swapped.__annotations__:
        if has_of_its_own(module, nn.Module, name):
            return f"it has an attribute named {name}, as swapped layers do"
    if isinstance(module, GraphModule):
        return "it is a graph of torch.fx, which writes its class anew; accelerate the model before tracing"
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
