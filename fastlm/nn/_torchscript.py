"""What torch.jit.script compiles of our modules: the forward of torch.nn's module of the same name."""

import types
from typing import Any

import torch


def torch_forward(module: type[torch.nn.Module]) -> Any:
    """The forward of a torch.nn class under the name _torch_forward: TorchScript has no super()."""
    forward: Any = module.forward
    renamed = types.FunctionType(forward.__code__, forward.__globals__, "_torch_forward", forward.__defaults__)
    renamed.__annotations__ = forward.__annotations__
    return renamed
