"""Layer norm and RMS norm, of a tensor or of the sum of a branch and the residual stream.

    h = residual + dropout(x), or x itself, rounded to the dtype that it is stored in
    mean = sum(h) / C for layer norm, 0 for RMS norm
    rstd = 1 / sqrt(sum((h - mean)^2) / C + eps)        h_hat = (h - mean) * rstd
    y = h_hat * weight + bias

    wdy = dy * weight
    dh = rstd * (wdy - sum(wdy) / C - h_hat * sum(wdy * h_hat) / C) + dsum, the gradient of h as an output of its own
    dresidual = dh        dx = dropout(dh), of the same elements        (RMS norm: without sum(wdy) / C)
    dweight = sum over rows of dy * h_hat        dbias = sum over rows of dy

The forward pass saves h, rstd and mean. All arithmetic is float32, long sums of a CPU float64. The Triton kernels are
in norm_triton.py, those for a CPU in csrc/norm_cpu.cpp. Both sum dweight and dbias in a fixed number of parts and a
fixed order, so gradients are the same on every run.

The Triton kernels draw dropout by Philox from (seed, row, column): backward draws the same numbers again, no mask is
stored. On a CPU PyTorch's own dropout runs before the kernel.

Sources: Ba, Kiros, Hinton 2016, Layer Normalization, arXiv 1607.06450; Zhang, Sennrich 2019, Root Mean Square Layer
Normalization, arXiv 1910.07467; Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3 (Philox).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy

from fastlm.ops import _torch, norm_triton
from fastlm.ops._dispatch import TORCH, route, use_cpp
from fastlm.ops._dropout import check_dropout, kept_factor, seed_tensor, uniform
from fastlm.ops._fx import recorded
from fastlm.ops._library import as_floats
from fastlm.ops._register import apply, differentiable_gradients, is_double_backward, register


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


def default_eps(dtype: torch.dtype) -> float:
    """As in torch: finfo.eps of the dtype that it computes in, which is float32 for the 16-bit ones."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def rms_norm_reference(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """The formula in plain PyTorch, in float32 (float64 for float64 input)."""
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    dims = tuple(range(-len(normalized_shape), 0))
    y = x * torch.rsqrt(x.square().mean(dims, keepdim=True) + (default_eps(input.dtype) if eps is None else eps))
    return (y if weight is None else y * weight).to(input.dtype)


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
    """The formula in plain PyTorch; a seed drops the elements of x (..., C) that the Triton kernels drop."""
    new_residual = add_reference(x, residual, dropout_p, seed)
    return layer_norm_reference(new_residual, normalized_shape, weight, bias, eps).to(x.dtype), new_residual


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
    """The formula in plain PyTorch; a seed drops the elements of x (..., C) that the Triton kernels drop."""
    new_residual = add_reference(x, residual, dropout_p, seed)
    return rms_norm_reference(new_residual, normalized_shape, weight, eps).to(x.dtype), new_residual


def add_reference(x: Tensor, residual: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """residual + dropout(x) in plain PyTorch, in float32 (float64 for float64), with the kernels' own dropout."""
    wide = torch.promote_types(torch.promote_types(x.dtype, residual.dtype), torch.float32)
    added = x.to(wide) if seed is None else x.to(wide) * dropout_factors(x, x.shape[-1], dropout_p, seed)
    return (residual.to(wide) + added).to(residual.dtype)


def dropout_factors(x: Tensor, C: int, dropout_p: float, seed: Tensor) -> Tensor:
    """The factor of each element of x, rows of C: 0, or 1 / (1 - dropout_p). Only the shape and device of x matter.

    Philox takes the counters column / 4, row, 0, 0, and gives the numbers of four columns.
    """
    row = torch.arange(x.numel() // max(C, 1), device=x.device)[:, None]
    column = torch.arange(-(-C // 4), device=x.device)[None, :]
    zero = torch.zeros_like(column)
    drawn = uniform(seed, column, row, zero, zero)[:, :C]
    return torch.where(drawn >= dropout_p, kept_factor(dropout_p), 0.0).reshape(x.shape)


# Raw ops


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def forward(
    x: Tensor,
    residual: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
    has_mean: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y of that dtype, h or nothing without residual, mean (N,) or nothing for RMS norm, rstd (N,)) of x (..., C)."""
    y, h, mean, rstd = forward_outputs(
        x, residual, normalized_shape, weight, bias, seed, dropout_p, eps, has_mean, dtype
    )
    if not rstd.numel():
        return y, h, mean, rstd
    x, residual = x.contiguous(), contiguous(residual)
    outputs = y, None if residual is None else h, mean if has_mean else None, rstd
    if use_cpp(x):
        torch.ops.fastlm.norm_rows(x, residual, as_floats(weight), as_floats(bias), eps, *outputs)
    else:
        norm_triton.launch_forward(x, residual, contiguous(weight), contiguous(bias), seed, dropout_p, eps, *outputs)
    return y, h, mean, rstd


def forward_outputs(
    x: Tensor,
    residual: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
    has_mean: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What forward returns, before a kernel fills it: this alone is what a traced program needs to know."""
    N = x.numel() // math.prod(normalized_shape)
    y = x.new_empty(x.shape, dtype=dtype)
    h = x.new_empty(0) if residual is None else x.new_empty(x.shape, dtype=residual.dtype)
    mean = x.new_empty(N if has_mean else 0, dtype=torch.float32)
    return y, h, mean, x.new_empty(N, dtype=torch.float32)


def backward(
    dy: Tensor,
    dsum: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx of that dtype, dresidual, dweight, dbias); what `needs` does not ask for is empty and costs nothing."""
    outputs = backward_outputs(dy, dsum, h, weight, bias, mean, rstd, seed, dropout_p, dtype, needs)
    if not rstd.numel():
        dx, dresidual, dweight, dbias = outputs
        return dx, dresidual, dweight.zero_(), dbias.zero_()
    wanted = [output if needed else None for output, needed in zip(outputs, needs, strict=True)]
    inputs = dy.contiguous(), contiguous(dsum), h.contiguous()
    if use_cpp(h):
        torch.ops.fastlm.norm_backward_rows(*inputs, as_floats(weight), mean, rstd, *wanted)
    else:
        norm_triton.launch_backward(*inputs, contiguous(weight), mean, rstd, seed, dropout_p, wanted)
    return outputs


def backward_outputs(
    dy: Tensor,
    dsum: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What backward returns, before a kernel fills it."""
    dx = h.new_empty(h.shape if needs[0] else 0, dtype=dtype)
    dresidual = h.new_empty(h.shape if needs[1] else 0)
    dweight = weight.new_empty(weight.shape) if needs[2] and weight is not None else dx.new_empty(0)
    dbias = bias.new_empty(bias.shape) if needs[3] and bias is not None else dx.new_empty(0)
    return dx, dresidual, dweight, dbias


def dropout_noise(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """dropout_factors without a kernel: in x's dtype, and drawn by PyTorch's generator, which is faster there."""
    generator = torch.Generator(x.device).manual_seed(int(seed))
    noise = torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(1.0 - dropout_p, generator=generator)
    return noise.mul_(kept_factor(dropout_p))


forward_op = register(
    "norm(Tensor x, Tensor? residual, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, Tensor? seed,"
    " float dropout_p, float eps, bool has_mean, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    forward,
    forward_outputs,
)
backward_op = register(
    "norm_backward(Tensor dy, Tensor? dsum, Tensor h, Tensor? weight, Tensor? bias, Tensor? mean, Tensor rstd,"
    " Tensor? seed, float dropout_p, ScalarType dtype, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    backward,
    backward_outputs,
)
dropout_noise_op = register(
    "dropout_noise(Tensor x, float dropout_p, Tensor seed) -> Tensor",
    dropout_noise,
    lambda x, dropout_p, seed: x.new_empty(x.shape),
    keys=["CompositeExplicitAutograd"],  # PyTorch's code, on any device
)


# Autograd

Reference = Callable[..., Tensor]


class NormFunction(torch.autograd.Function):
    """Joins the two raw ops into one differentiable function of x, or of x and residual, which also returns h."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        normalized_shape: Sequence[int],
        weight: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        dropout_p: float,
        eps: float,
        dtype: torch.dtype,
        reference: Reference,
        has_mean: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        y, h, mean, rstd = forward_op(
            x, residual, normalized_shape, weight, bias, seed, dropout_p, eps, has_mean, dtype
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if residual is None else h, weight, bias, mean if has_mean else None, rstd, seed)
        ctx.normalized_shape, ctx.dropout_p, ctx.eps, ctx.reference = normalized_shape, dropout_p, eps, reference
        ctx.dtype, ctx.y_dtype = x.dtype, dtype
        return y if residual is None else (y, h)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None = None) -> tuple[Tensor | None, ...]:
        h, weight, bias, mean, rstd, seed = ctx.saved_tensors
        dy = h.new_zeros(h.shape, dtype=ctx.y_dtype) if dy is None else dy
        asked = [ctx.needs_input_grad[index] for index in (0, 1, 3, 4)]
        # Without dropout and in one dtype the gradients of x and residual are equal: they share a tensor.
        is_shared = asked[0] and asked[1] and seed is None and ctx.dtype == h.dtype
        needs = [asked[0], asked[1] and not is_shared, *asked[2:]]
        if is_double_backward():
            gradients = gradients_in_pytorch(ctx, dy, dsum, h, weight, bias, seed, needs)
        else:
            gradients = backward_op(dy, dsum, h, weight, bias, mean, rstd, seed, ctx.dropout_p, ctx.dtype, needs)
        dx, dresidual, dweight, dbias = (
            gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)
        )
        return dx, dx if is_shared else dresidual, None, dweight, dbias, None, None, None, None, None, None


def gradients_in_pytorch(
    ctx: Any,
    dy: Tensor,
    dsum: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """(dx, dresidual, dweight, dbias), which autograd can differentiate again."""

    def norm(h: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return ctx.reference(h, ctx.normalized_shape, weight, eps=ctx.eps, **({} if bias is None else {"bias": bias}))

    needs_dh = needs[0] or needs[1]
    dh, dweight, dbias = differentiable_gradients(norm, (h, weight, bias), (needs_dh, *needs[2:]), (dy,))
    if dh is None:
        return [None, None, dweight, dbias]
    dh = dh if dsum is None else dh + dsum
    C = math.prod(ctx.normalized_shape)
    dx = dh if seed is None else dh * dropout_factors(h, C, ctx.dropout_p, seed)
    return [dx.to(ctx.dtype), dh, dweight, dbias]


def run_kernels(
    reference: Reference,
    x: Tensor,
    residual: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    *,
    has_mean: bool,
    dtype: torch.dtype | None,
) -> Any:
    """y of dtype, or (y, h) with residual, of a call whose route is a kernel."""
    if dtype is None:  # autocast runs these norms in float32 on CUDA; the kernels compute in float32 anyway
        dtype = torch.float32 if x.is_cuda and torch.is_autocast_enabled("cuda") else x.dtype
    if dropout_p and use_cpp(x):
        x, dropout_p = drop(x, dropout_p, seed), 0.0
    return apply(
        NormFunction,
        x.contiguous(),
        contiguous(residual),
        normalized_shape,
        weight,
        bias,
        seed_tensor(seed, x.device) if dropout_p else None,
        dropout_p,
        eps,
        dtype,
        reference,
        has_mean,
    )


def add(x: Tensor, residual: Tensor, dropout_p: float, seed: Tensor | int | None) -> Tensor:
    """residual + dropout(x), of residual's dtype, by PyTorch's code."""
    return (residual + (drop(x, dropout_p, seed) if dropout_p else x)).to(residual.dtype)


def drop(x: Tensor, dropout_p: float, seed: Tensor | int | None) -> Tensor:
    if seed is None:
        return F.dropout(x, dropout_p)
    return x * dropout_noise_op(x.detach(), dropout_p, seed_tensor(seed, x.device))


def is_one_dtype(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether PyTorch's own function accepts these on every device; the reference accepts any dtypes."""
    return all(tensor is None or tensor.dtype == input.dtype for tensor in (weight, bias))


# Checks


def check_arguments(
    op: str,
    name: str,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None = None,
) -> None:
    """Raises what is wrong with the arguments that all four ops have; name is that of x in the op's signature."""
    if isinstance(normalized_shape, int):
        raise TypeError(f"{op}: normalized_shape is an int, expected a sequence: ({normalized_shape},)")
    shape = tuple(normalized_shape)
    if not shape or tuple(x.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"{op}: normalized_shape is {shape}, expected the last dimensions of {name}, whose shape is "
            f"{tuple(x.shape)}"
        )
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name} is {x.dtype}, expected a floating-point tensor; convert it first")
    for parameter_name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if parameter.shape != shape:
            raise ValueError(
                f"{op}: {parameter_name} has shape {tuple(parameter.shape)}, expected {shape} to match normalized_shape"
            )
        check_companion(op, parameter_name, parameter, name, x)


def check_companion(op: str, name: str, tensor: Tensor, main_name: str, main: Tensor) -> None:
    if tensor.device != main.device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device}, expected {main.device}, where {main_name} is; move it there"
        )
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} is {tensor.dtype}, expected a floating-point tensor")


def check_added(op: str, x: Tensor, residual: Tensor, dropout_p: float, seed: Tensor | int | None) -> None:
    """Raises what is wrong with the arguments that only the forms with a residual have."""
    if residual.shape != x.shape:
        raise ValueError(f"{op}: residual has shape {tuple(residual.shape)}, expected {tuple(x.shape)}, the shape of x")
    check_companion(op, "residual", residual, "x", x)
    check_dropout(op, "x", x, dropout_p, seed)


# Public functions


def in_widest_dtype(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    """tensors for PyTorch's code, which computes in their dtype: rounded there, neither y nor its gradient is exact."""
    for tensor in tensors:
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Normalise the last dimensions of input to zero mean and unit variance, then scale and shift.

        y = (x - mean) * rstd * weight + bias        rstd = 1 / sqrt(var + eps)

    input    (..., *normalized_shape)  float32, float16 or bfloat16 for the kernels; any other runs PyTorch's code
    weight   normalized_shape          any of those
    bias     normalized_shape          any of those
    dtype    of the result; None is that of input, float32 under CUDA autocast
    returns  shape of input            statistics are float32

    Equals torch.nn.functional.layer_norm where dtype is left out. Raises ValueError if a shape or device disagrees,
    TypeError for a dtype.
    Source: Ba, Kiros, Hinton 2016, arXiv 1607.06450.
    """
    if isinstance(input, Proxy) or isinstance(weight, Proxy):
        return recorded(layer_norm, locals())
    if route("layer_norm", (input, weight, bias), (normalized_shape, dtype)).implementation != TORCH:
        check_arguments("layer_norm", "input", input, normalized_shape, weight, bias)
        return run_kernels(
            layer_norm_reference, input, None, normalized_shape, weight, bias, eps, has_mean=True, dtype=dtype
        )
    if dtype is not None:
        check_arguments("layer_norm", "input", input, normalized_shape, weight, bias)
        input, weight, bias = in_widest_dtype(dtype, input, weight, bias)
    try:
        y = _torch.layer_norm(input, normalized_shape, weight, bias, eps)
    except (RuntimeError, TypeError):
        # PyTorch checks its own arguments, and we only reword the error: checks first cost a third of a small call.
        check_arguments("layer_norm", "input", input, normalized_shape, weight, bias)
        if is_one_dtype(input, weight, bias):
            raise
        y = layer_norm_reference(input, normalized_shape, weight, bias, eps)
    return y if dtype is None else y.to(dtype)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Divide input by the root of its mean square over the last dimensions, then scale by weight.

        y = x * rstd * weight        rstd = 1 / sqrt(sum(x^2) / C + eps)

    input    (..., *normalized_shape)  float32, float16 or bfloat16 for the kernels; any other runs PyTorch's code
    weight   normalized_shape          any of those
    eps      None is torch.finfo(dtype).eps of the dtype computed in, float32 for the 16-bit ones
    dtype    of the result; None is that of input, float32 under CUDA autocast
    returns  shape of input

    Equals torch.nn.functional.rms_norm where dtype is left out. Raises ValueError if a shape or device disagrees,
    TypeError for a dtype.
    Source: Zhang, Sennrich 2019, arXiv 1910.07467.
    """
    if isinstance(input, Proxy) or isinstance(weight, Proxy):
        return recorded(rms_norm, locals())
    if route("rms_norm", (input, weight), (normalized_shape, dtype)).implementation != TORCH:
        check_arguments("rms_norm", "input", input, normalized_shape, weight)
        eps = default_eps(input.dtype) if eps is None else eps
        return run_kernels(
            rms_norm_reference, input, None, normalized_shape, weight, None, eps, has_mean=False, dtype=dtype
        )
    if dtype is not None:
        check_arguments("rms_norm", "input", input, normalized_shape, weight)
        input, weight = in_widest_dtype(dtype, input, weight)
    try:
        y = _torch.rms_norm(input, normalized_shape, weight, eps)
    except (RuntimeError, TypeError):
        # PyTorch checks its own arguments, and we only reword the error.
        check_arguments("rms_norm", "input", input, normalized_shape, weight)
        raise
    return y if dtype is None else y.to(dtype)


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
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream, with dropout, and layer-normalise the sum.

        new_residual = residual + dropout(x)        normalised = layer_norm(new_residual)

    x             (..., *normalized_shape)  float32, float16 or bfloat16 for the kernels; any other runs PyTorch's code
    residual      shape of x                any of those
    weight, bias  normalized_shape          any of those
    seed          int, or an int64 tensor of one element on x's device; None draws one from PyTorch's generator
    dtype         of normalised; None is x's, float32 under CUDA autocast
    returns       normalised, new_residual of residual's dtype

    Dropout is applied whenever dropout_p is not 0: pass 0 to evaluate. Backward draws it again from the seed; no mask
    is stored. As in PyTorch, a seed drops different elements on a CPU than on a GPU.
    Raises ValueError for a shape, device, probability or seed out of range, TypeError for a dtype.
    Source: Ba, Kiros, Hinton 2016, arXiv 1607.06450.
    """
    if isinstance(x, Proxy) or isinstance(residual, Proxy) or isinstance(weight, Proxy):
        return recorded(add_layer_norm, locals())
    check_arguments("add_layer_norm", "x", x, normalized_shape, weight, bias)
    check_added("add_layer_norm", x, residual, dropout_p, seed)
    found = route("add_layer_norm", (x, residual, weight, bias), (normalized_shape, dtype))
    if found.implementation != TORCH:
        return run_kernels(
            layer_norm_reference, x, residual, normalized_shape, weight, bias, eps, dropout_p, seed,
            has_mean=True, dtype=dtype,
        )  # fmt: skip
    new_residual = add(x, residual, dropout_p, seed)
    norm = _torch.layer_norm if is_one_dtype(new_residual, weight, bias) else layer_norm_reference
    return norm(new_residual, normalized_shape, weight, bias, eps).to(dtype or x.dtype), new_residual


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream, with dropout, and RMS-normalise the sum.

        new_residual = residual + dropout(x)        normalised = rms_norm(new_residual)

    x         (..., *normalized_shape)  float32, float16 or bfloat16 for the kernels; any other runs PyTorch's code
    residual  shape of x                any of those
    weight    normalized_shape          any of those
    eps       None is torch.finfo(dtype).eps of the dtype computed in, float32 for the 16-bit ones
    seed      int, or an int64 tensor of one element on x's device; None draws one from PyTorch's generator
    dtype     of normalised; None is x's, float32 under CUDA autocast
    returns   normalised, new_residual of residual's dtype

    Dropout is applied whenever dropout_p is not 0: pass 0 to evaluate. Backward draws it again from the seed; no mask
    is stored. As in PyTorch, a seed drops different elements on a CPU than on a GPU.
    Raises ValueError for a shape, device, probability or seed out of range, TypeError for a dtype.
    Source: Zhang, Sennrich 2019, arXiv 1910.07467.
    """
    if isinstance(x, Proxy) or isinstance(residual, Proxy) or isinstance(weight, Proxy):
        return recorded(add_rms_norm, locals())
    check_arguments("add_rms_norm", "x", x, normalized_shape, weight)
    check_added("add_rms_norm", x, residual, dropout_p, seed)
    if route("add_rms_norm", (x, residual, weight), (normalized_shape, dtype)).implementation != TORCH:
        eps = default_eps(residual.dtype) if eps is None else eps
        return run_kernels(
            rms_norm_reference, x, residual, normalized_shape, weight, None, eps, dropout_p, seed,
            has_mean=False, dtype=dtype,
        )  # fmt: skip
    new_residual = add(x, residual, dropout_p, seed)
    return _torch.rms_norm(new_residual, normalized_shape, weight, eps).to(dtype or x.dtype), new_residual
