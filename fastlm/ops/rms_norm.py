"""RMS normalisation over the last dimensions.

    y = x * rstd * weight        rstd = 1 / sqrt(mean(x^2) + eps)

Gradient, with g = dy * weight:  dx = rstd * (g - x * rstd^2 * mean(g * x)),  dweight = sum over rows of dy * x * rstd.
Source: Zhang, Sennrich 2019, arXiv 1910.07467.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """The op in plain PyTorch, float32 inside; eps None is the smallest step of input's dtype, as in torch."""
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    dims = tuple(range(-len(normalized_shape), 0))
    y = x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)
    return (y if weight is None else y * weight).to(input.dtype)


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Divide input by the root of its mean square over the last dimensions, then scale by weight.

    input    (..., *normalized_shape)
    weight   normalized_shape
    returns  shape and dtype of torch.nn.functional.rms_norm

    Equals torch.nn.functional.rms_norm. Raises ValueError if a shape disagrees.
    """
    shape = tuple(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(f"rms_norm: input has shape {tuple(input.shape)}, expected it to end in {shape}")
    if weight is not None and tuple(weight.shape) != shape:
        raise ValueError(f"rms_norm: weight has shape {tuple(weight.shape)}, expected {shape} as normalized_shape says")
    return F.rms_norm(input, shape, weight, eps)
