"""What a search for a faster layer finds, and what of a module it may look at."""

import inspect
from typing import Any, NamedTuple

from torch import nn

FAMILIES = ("attention", "norms", "activations", "loss")


class Match(NamedTuple):
    """What may compute a module."""

    layer: type[nn.Module]  # its forward replaces the module's
    form: Any  # what the layer has to know of the module; hashable
    name: str  # for people
    parts: tuple[tuple[nn.Module, type[nn.Module]], ...] = ()  # modules inside that must run another forward too


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


OF_EVERY_MODULE = frozenset(vars(nn.Module()))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """What a module keeps beside its tensors and children, which with its class decides what it computes."""
    return {name: value for name, value in vars(module).items() if name not in OF_EVERY_MODULE}


def is_watched(module: nn.Module) -> bool:
    """Whether somebody hears or replaces a call of the module itself."""
    return "forward" in vars(module) or any(getattr(module, hooks) for hooks in HOOKS)


def is_from_torch(module: nn.Module) -> bool:
    return type(module).__module__.split(".")[0] == "torch"
