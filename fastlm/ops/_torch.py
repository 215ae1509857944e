"""PyTorch's own functions, for the forms of a call that no kernel of ours takes.

They are the builtins below torch.nn.functional and torch, because ours may be put in the place of the functions there,
before this file is imported or after: an op that looked PyTorch's up by its public name would then call itself.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import _reduction

Function = TypeVar("Function", bound=Callable[..., object])

layer_norm = torch._C._VariableFunctions.layer_norm
rms_norm = torch._C._VariableFunctions.rms_norm
gelu = torch._C._nn.gelu
scaled_dot_product_attention = torch._C._nn.scaled_dot_product_attention


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """torch.nn.functional.cross_entropy without its two deprecated arguments; TorchScript compiles it."""
    mode = _reduction.get_enum(reduction)
    return torch._C._nn.cross_entropy_loss(input, target, weight, mode, ignore_index, label_smoothing)  # type: ignore


def assume_constant_result(function: Function) -> Function:
    """torch.compiler.assume_constant_result, without importing all of torch.compile as it does."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
