"""Layer normalisation, of a tensor or of the sum of a branch and the residual stream.

    mean = sum(x) / C       var = sum((x - mean)^2) / C       rstd = 1 / sqrt(var + eps)
    x_hat = (x - mean) * rstd
    y = x_hat * weight + bias

    wdy = dy * weight
    dx = rstd * (wdy - sum(wdy) / C - x_hat * sum(wdy * x_hat) / C)
    dweight = sum over rows of dy * x_hat       dbias = sum over rows of dy

The kernels, and what is saved for backward, are in _norm.py: RMS norm runs the same ones.

Source: Ba, Kiros, Hinton 2016, Layer Normalization, arXiv 1607.06450.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Proxy

from fastlm.ops import _torch
from fastlm.ops._fx import recorded
from fastlm.ops._norm import add, add_reference, check_added, check_arguments, kernels_serve, run_kernels


def layer_norm_reference(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The formula in plain PyTorch, in float32 (float64 for float64 input)."""
    dims = tuple(range(-len(normalized_shape), 0))
    x = input if input.dtype == torch.float64 else input.float()
    centered = x - x.mean(dims, keepdim=True)
    rstd = torch.rsqrt(centered.square().mean(dims, keepdim=True) + eps)
    y = centered * rstd
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y.to(input.dtype)


def add_layer_norm_reference(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula in plain PyTorch; a seed drops the elements of x (..., C) that the kernels drop."""
    new_residual = add_reference(x, residual, dropout_p, seed)
    return layer_norm_reference(new_residual, normalized_shape, weight, bias, eps).to(x.dtype), new_residual


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise the last dimensions of input to zero mean and unit variance, then scale and shift.

        y = (x - mean) * rstd * weight + bias        rstd = 1 / sqrt(var + eps)

    input    (..., *normalized_shape)  float32, float16 or bfloat16 for the kernels; any other runs PyTorch's code
    weight   normalized_shape          any of those
    bias     normalized_shape          any of those
    returns  shape of input            dtype of input, float32 under CUDA autocast; statistics are float32

    Equals torch.nn.functional.layer_norm. Raises ValueError if a shape or device disagrees, TypeError for a dtype.
    Source: Ba, Kiros, Hinton 2016, arXiv 1607.06450.
    """
    if isinstance(input, Proxy) or isinstance(weight, Proxy):
        return recorded(layer_norm, locals())
    if kernels_serve("layer_norm", input, normalized_shape, weight, bias):
        check_arguments("layer_norm", "input", input, normalized_shape, weight, bias)
        return run_kernels(layer_norm_reference, input, None, normalized_shape, weight, bias, eps, has_mean=True)
    try:
        return _torch.layer_norm(input, normalized_shape, weight, bias, eps)
    except (RuntimeError, TypeError):
        # PyTorch has checked its arguments, ours only word the error: to check first costs a third of a small call.
        check_arguments("layer_norm", "input", input, normalized_shape, weight, bias)
        if is_one_dtype(input, weight, bias):
            raise
        return layer_norm_reference(input, normalized_shape, weight, bias, eps)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream, with dropout, and layer-normalise the sum.

        new_residual = residual + dropout(x)        normalised = layer_norm(new_residual)

    x             (..., *normalized_shape)  float32, float16 or bfloat16 for the kernels; any other runs PyTorch's code
    residual      shape of x                any of those
    weight, bias  normalized_shape          any of those
    seed          int, or an int64 tensor of one element on x's device; None draws one from PyTorch's generator
    returns       normalised of x's dtype (float32 under CUDA autocast), new_residual of residual's dtype

    Dropout is applied whenever dropout_p is not 0: pass 0 to evaluate. Backward draws it again from the seed, nothing
    is stored. As in PyTorch, a seed drops other elements on a CPU than on a GPU.
    Raises ValueError for a shape, device, probability or seed out of range, TypeError for a dtype.
    Source: Ba, Kiros, Hinton 2016, arXiv 1607.06450.
    """
    if isinstance(x, Proxy) or isinstance(residual, Proxy) or isinstance(weight, Proxy):
        return recorded(add_layer_norm, locals())
    check_arguments("add_layer_norm", "x", x, normalized_shape, weight, bias)
    check_added("add_layer_norm", x, residual, dropout_p, seed)
    if kernels_serve("add_layer_norm", x, normalized_shape, residual, weight, bias):
        return run_kernels(
            layer_norm_reference, x, residual, normalized_shape, weight, bias, eps, dropout_p, seed, has_mean=True
        )
    new_residual = add(x, residual, dropout_p, seed)
    norm = _torch.layer_norm if is_one_dtype(new_residual, weight, bias) else layer_norm_reference
    return norm(new_residual, normalized_shape, weight, bias, eps).to(x.dtype), new_residual


def is_one_dtype(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether PyTorch's own takes these on every device; the reference takes any."""
    return all(tensor is None or tensor.dtype == input.dtype for tensor in (weight, bias))
