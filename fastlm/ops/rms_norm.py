"""RMS normalisation, of a tensor or of the sum of a branch and the residual stream.

    rstd = 1 / sqrt(sum(x^2) / C + eps)        y = x * rstd * weight

    wdy = dy * weight
    dx = rstd * (wdy - x * rstd^2 * sum(wdy * x) / C)
    dweight = sum over rows of dy * x * rstd

The kernels, and what is saved for backward, are in _norm.py: layer norm runs the same ones.

Source: Zhang, Sennrich 2019, Root Mean Square Layer Normalization, arXiv 1910.07467.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Proxy

from fastlm.ops import _torch
from fastlm.ops._fx import recorded
from fastlm.ops._norm import add, add_reference, check_added, check_arguments, kernels_serve, run_kernels


def default_eps(dtype: torch.dtype) -> float:
    """As in torch: the smallest step of the dtype that it computes in, float32 for the 16-bit ones."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def rms_norm_reference(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """The formula in plain PyTorch, in float32 (float64 for float64 input)."""
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    dims = tuple(range(-len(normalized_shape), 0))
    y = x * torch.rsqrt(x.square().mean(dims, keepdim=True) + (default_eps(input.dtype) if eps is None else eps))
    return (y if weight is None else y * weight).to(input.dtype)


def add_rms_norm_reference(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula in plain PyTorch; a seed drops the elements of x (..., C) that the kernels drop."""
    new_residual = add_reference(x, residual, dropout_p, seed)
    return rms_norm_reference(new_residual, normalized_shape, weight, eps).to(x.dtype), new_residual


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Divide input by the root of its mean square over the last dimensions, then scale by weight.

        y = x * rstd * weight        rstd = 1 / sqrt(sum(x^2) / C + eps)

    input    (..., *normalized_shape)  float32, float16 or bfloat16 for the kernels; any other runs PyTorch's code
    weight   normalized_shape          any of those
    eps      None is torch.finfo(dtype).eps of the dtype computed in, float32 for the 16-bit ones
    returns  shape of input            dtype of input, float32 under CUDA autocast

    Equals torch.nn.functional.rms_norm. Raises ValueError if a shape or device disagrees, TypeError for a dtype.
    Source: Zhang, Sennrich 2019, arXiv 1910.07467.
    """
    if isinstance(input, Proxy) or isinstance(weight, Proxy):
        return recorded(rms_norm, locals())
    if kernels_serve("rms_norm", input, normalized_shape, weight):
        check_arguments("rms_norm", "input", input, normalized_shape, weight)
        eps = default_eps(input.dtype) if eps is None else eps
        return run_kernels(rms_norm_reference, input, None, normalized_shape, weight, None, eps, has_mean=False)
    try:
        return _torch.rms_norm(input, normalized_shape, weight, eps)
    except (RuntimeError, TypeError):
        # PyTorch has checked its arguments, ours only word the error.
        check_arguments("rms_norm", "input", input, normalized_shape, weight)
        raise


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream, with dropout, and RMS-normalise the sum.

        new_residual = residual + dropout(x)        normalised = rms_norm(new_residual)

    x         (..., *normalized_shape)  float32, float16 or bfloat16 for the kernels; any other runs PyTorch's code
    residual  shape of x                any of those
    weight    normalized_shape          any of those
    eps       None is torch.finfo(dtype).eps of the dtype computed in, float32 for the 16-bit ones
    seed      int, or an int64 tensor of one element on x's device; None draws one from PyTorch's generator
    returns   normalised of x's dtype (float32 under CUDA autocast), new_residual of residual's dtype

    Dropout is applied whenever dropout_p is not 0: pass 0 to evaluate. Backward draws it again from the seed, nothing
    is stored. As in PyTorch, a seed drops other elements on a CPU than on a GPU.
    Raises ValueError for a shape, device, probability or seed out of range, TypeError for a dtype.
    Source: Zhang, Sennrich 2019, arXiv 1910.07467.
    """
    if isinstance(x, Proxy) or isinstance(residual, Proxy) or isinstance(weight, Proxy):
        return recorded(add_rms_norm, locals())
    check_arguments("add_rms_norm", "x", x, normalized_shape, weight)
    check_added("add_rms_norm", x, residual, dropout_p, seed)
    if kernels_serve("add_rms_norm", x, normalized_shape, residual, weight):
        eps = default_eps(residual.dtype) if eps is None else eps
        return run_kernels(
            rms_norm_reference, x, residual, normalized_shape, weight, None, eps, dropout_p, seed, has_mean=False
        )
    new_residual = add(x, residual, dropout_p, seed)
    return _torch.rms_norm(new_residual, normalized_shape, weight, eps).to(x.dtype), new_residual
