"""What a search for a faster layer finds, and what of a module it may look at."""

import inspect
from collections.abc import Set
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

FAMILIES = ("attention", "norms", "activations", "loss")
Kept: TypeAlias = tuple[tuple[str, Any], ...]  # names and values of attributes


class Match(NamedTuple):
    """What may compute a module."""

    layer: type[nn.Module]  # its forward replaces the module's
    form: Any  # what the layer has to know of the module; hashable
    name: str  # for people
    parts: tuple[tuple[nn.Module, type[nn.Module]], ...] = ()  # modules inside that must run another forward too
    reads: tuple[str, ...] = ()  # attributes of the module that the layer looks up at each call
    kept: Kept = ()  # the others that the module's code looks up


class Refusal(NamedTuple):
    """Why a module that looks like one of a family keeps its own code."""

    reason: str


class Row(NamedTuple):
    """What became of one layer."""

    name: str  # of the module in the model; "" is the model itself
    module: str  # its class
    family: str
    swapped: bool
    detail: str  # what computes it now, or why it stays as it was


def takes_one_tensor(module: nn.Module) -> bool:
    """Whether forward can be called with a single argument."""
    try:
        inspect.signature(module.forward).bind(object())
    except (TypeError, ValueError):
        return False
    return True


OURS = "_fastlm_"  # begins the names of attributes that accelerate sets
OF_EVERY_MODULE = frozenset(vars(nn.Module()))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """What a module keeps beside its tensors and children, which with its class decides what it computes."""
    return {
        name: value for name, value in vars(module).items() if name not in OF_EVERY_MODULE and not name.startswith(OURS)
    }


def has_of_its_own(module: nn.Module, theirs: type[nn.Module], name: str) -> bool:
    """Whether a module has something under a name that its base class theirs has not, or has otherwise."""
    holders = vars(module), module._parameters, module._buffers, module._modules
    of_class = (inspect.getattr_static(each, name, None) for each in (type(module), theirs))
    return any(name in names for names in holders) or next(of_class) is not next(of_class)


PLAIN = (bool, int, float, str, type(None), torch.dtype, FunctionType, BuiltinFunctionType)  # whose copies are equal


def kept_by(module: nn.Module, names: Set[str]) -> Kept:
    """The attributes of these names, such as a rate of dropout or a function, that may have another value later.

    A child's are those of names such as "act.inplace".
    """
    kept = own_attributes(module)
    for child_name, child in module.named_children():
        kept |= {f"{child_name}.{name}": value for name, value in own_attributes(child).items()}
    return tuple((name, value) for name, value in kept.items() if name in names and type(value) in PLAIN)


def is_watched(module: nn.Module) -> bool:
    """Whether somebody hears or replaces a call of the module itself."""
    return "forward" in vars(module) or any(getattr(module, hooks) for hooks in HOOKS)


def is_from_torch(module: nn.Module) -> bool:
    return type(module).__module__.split(".")[0] == "torch"


def is_pytorchs(theirs: type[nn.Module], name: str) -> bool:
    """Whether a class of torch.nn has the method that PyTorch wrote, not one that somebody put in its place."""
    method = inspect.getattr_static(theirs, name)
    written_as = getattr(method, "__module__", None), getattr(method, "__qualname__", None)
    return written_as == (theirs.__module__, f"{theirs.__qualname__}.{name}") and not hasattr(method, "__wrapped__")
