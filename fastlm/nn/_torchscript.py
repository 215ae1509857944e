"""What torch.jit.script compiles of our modules: the forward of torch.nn's module of the same name."""

import types
from typing import Any

import torch


def torch_forward(module: type[torch.nn.Module]) -> Any:
    """The forward of a torch.nn class under the name _torch_forward: TorchScript has no super()."""
    forward: Any = module.forward
    name, code = "_torch_forward", forward.__code__
    renamed = types.FunctionType(code, forward.__globals__, name, forward.__defaults__, forward.__closure__)
    renamed.__annotations__ = forward.__annotations__
    return renamed
