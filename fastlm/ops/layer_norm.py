"""Layer normalisation.

    mean = sum(x) / C       var = sum((x - mean)^2) / C       rstd = 1 / sqrt(var + eps)
    x_hat = (x - mean) * rstd
    y = x_hat * weight + bias

    wdy = dy * weight
    dx = rstd * (wdy - sum(wdy) / C - x_hat * sum(wdy * x_hat) / C)
    dweight = sum over rows of dy * x_hat       dbias = sum over rows of dy

The forward pass saves x, mean and rstd. All arithmetic is float32; the variance is summed over x - mean, never as
mean(x^2) - mean^2, which cancels for rows far from zero. The backward pass reads x and dy once: each of a fixed number
of programs walks over its share of the rows with its own partial sums of dweight and dbias, which a second, small
kernel adds up in a fixed order, so gradients are the same on every run.

Source: Ba, Kiros, Hinton 2016, Layer Normalization, arXiv 1607.06450.
"""

# mypy: disallow-untyped-defs=False
# (only the kernels have none: Triton gives their arguments types at each launch)

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops._triton import launch_on, num_sms, runs_kernels, tl, triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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


@triton.jit
def forward_kernel(
    x_ptr,  # (N, C)
    weight_ptr,  # (C,) or None
    bias_ptr,  # (C,) or None
    y_ptr,  # (N, C)
    mean_ptr,  # (N,)
    rstd_ptr,  # (N,)
    N,
    C,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_C)
    in_row = cols < C
    mask = (rows < N)[:, None] & in_row[None, :]
    offsets = rows.to(tl.int64)[:, None] * C + cols[None, :]

    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    # The rounding of a first mean would show in rows far from zero: 3.7, 3.7, ... must give 0. So the mean is corrected
    # by that of x - mean, which comes with the variance: both sums wait for the same barrier.
    mean = tl.sum(x, axis=1) / C
    centered = tl.where(in_row[None, :], x - mean[:, None], 0.0)  # padding would add mean^2 to the variance
    correction = tl.sum(centered, axis=1) / C
    var = tl.sum(centered * centered, axis=1) / C - correction * correction
    rstd = 1.0 / tl.sqrt(tl.maximum(var, 0.0) + eps)
    y = (centered - correction[:, None]) * rstd[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]

    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean + correction, mask=rows < N)
    tl.store(rstd_ptr + rows, rstd, mask=rows < N)


@triton.jit
def backward_kernel(
    dy_ptr,  # (N, C)
    x_ptr,  # (N, C)
    weight_ptr,  # (C,) or None
    mean_ptr,  # (N,)
    rstd_ptr,  # (N,)
    dx_ptr,  # (N, C), or None when nobody asked
    dweight_ptr,  # (programs, C) float32, or None
    dbias_ptr,  # (programs, C) float32, or None
    N,
    C,
    HAS_WEIGHT: tl.constexpr,
    NEEDS_DX: tl.constexpr,
    NEEDS_DWEIGHT: tl.constexpr,
    NEEDS_DBIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = cols < C
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_C], tl.float32)

    for block in tl.range(program, tl.cdiv(N, BLOCK_N), tl.num_programs(0), num_stages=NUM_STAGES):
        rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (rows < N)[:, None] & in_row[None, :]
        offsets = rows.to(tl.int64)[:, None] * C + cols[None, :]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < N, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < N, other=0.0)[:, None]

        x_hat = (x - mean) * rstd  # padding columns hold -mean * rstd, but there dy is 0
        if NEEDS_DX:
            wdy = dy * weight if HAS_WEIGHT else dy
            mean_wdy = tl.sum(wdy, axis=1)[:, None] / C
            mean_wdy_x_hat = tl.sum(wdy * x_hat, axis=1)[:, None] / C
            dx = (wdy - mean_wdy - x_hat * mean_wdy_x_hat) * rstd
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if NEEDS_DWEIGHT:
            dweight += tl.sum(dy * x_hat, axis=0)
        if NEEDS_DBIAS:
            dbias += tl.sum(dy, axis=0)

    if NEEDS_DWEIGHT:
        tl.store(dweight_ptr + program.to(tl.int64) * C + cols, dweight, mask=in_row)
    if NEEDS_DBIAS:
        tl.store(dbias_ptr + program.to(tl.int64) * C + cols, dbias, mask=in_row)


@triton.jit
def sum_partials_kernel(
    dweight_partials_ptr,  # (P, C) float32, or None
    dbias_partials_ptr,  # (P, C) float32, or None
    dweight_ptr,  # (C,) or None
    dbias_ptr,  # (C,) or None
    P,
    C,
    NEEDS_DWEIGHT: tl.constexpr,
    NEEDS_DBIAS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    dweight = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, P, BLOCK_P):
        partials = start + tl.arange(0, BLOCK_P)
        mask = (partials < P)[:, None] & (cols < C)[None, :]
        offsets = partials.to(tl.int64)[:, None] * C + cols[None, :]
        if NEEDS_DWEIGHT:
            dweight += tl.load(dweight_partials_ptr + offsets, mask=mask, other=0.0)
        if NEEDS_DBIAS:
            dbias += tl.load(dbias_partials_ptr + offsets, mask=mask, other=0.0)
    if NEEDS_DWEIGHT:
        tl.store(dweight_ptr + cols, tl.sum(dweight, axis=0).to(dweight_ptr.dtype.element_ty), mask=cols < C)
    if NEEDS_DBIAS:
        tl.store(dbias_ptr + cols, tl.sum(dbias, axis=0).to(dbias_ptr.dtype.element_ty), mask=cols < C)


class Tile(NamedTuple):
    """How much of (N, C) one turn of one program takes, with how many warps, and how many turns are in flight."""

    block_n: int
    block_c: int
    num_warps: int
    num_stages: int = 1


class Pass(NamedTuple):
    """One launch of the backward kernel, and which gradients it gives."""

    tile: Tile
    gives_dx: bool
    gives_sums: bool


MAX_C = 16384  # a program cannot hold a wider row in registers: it would spill, and PyTorch's kernels read it twice
SPLIT_C = 8192  # the same where dweight and dbias stand beside the row
COLUMNS = Tile(4, 1024, 4, 2)  # for dweight and dbias alone: columns are independent, so a program need not hold a row
PARTIALS = Tile(128, 32, 4)


def forward_tile(C: int) -> Tile:
    """One row, or as many short ones as make 4096 elements: 32 per thread are four 16-byte loads of bfloat16."""
    block_c = max(64, triton.next_power_of_2(C))
    return Tile(min(16, max(1, 4096 // block_c)), block_c, max(4, block_c // 1024))


def backward_passes(C: int, needs_dx: bool, needs_sums: bool) -> list[Pass]:
    """One pass over x and dy, or two for wide rows. Fewer elements per thread than forward: each has five values."""
    block_c = max(64, triton.next_power_of_2(C))
    num_warps = 4 if block_c <= 1024 else 8 if block_c <= 4096 else 16
    rows = Tile(min(16, max(1, 4096 // block_c)), block_c, num_warps, 2 if block_c <= SPLIT_C else 1)
    if C <= SPLIT_C or not needs_sums:
        return [Pass(rows, needs_dx, needs_sums)]
    return [Pass(rows, True, False)] * needs_dx + [Pass(COLUMNS, False, True)]


def backward_grid(N: int, C: int, tile: Tile, num_sms: int) -> tuple[int, int]:
    """As many programs as run at once, 16 warps on an SM: more would only leave more partial sums to add up."""
    across = triton.cdiv(C, tile.block_c)
    return min(triton.cdiv(N, tile.block_n), triton.cdiv(num_sms * (16 // tile.num_warps), across)), across


def forward(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output of that dtype, mean (N,), rstd (N,)) of an input (..., C)."""
    y, mean, rstd = forward_outputs(input, normalized_shape, weight, bias, eps, dtype)
    C, N = math.prod(normalized_shape), mean.numel()
    if N == 0:
        return y, mean, rstd
    tile = forward_tile(C)
    with launch_on(input):
        forward_kernel[(triton.cdiv(N, tile.block_n),)](
            input.contiguous(),
            None if weight is None else weight.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
            mean,
            rstd,
            N,
            C,
            eps,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            BLOCK_N=tile.block_n,
            BLOCK_C=tile.block_c,
            num_warps=tile.num_warps,
        )
    return y, mean, rstd


def forward_outputs(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """What forward returns, before a kernel fills it: this alone is what a traced program needs to know."""
    y = torch.empty(input.shape, dtype=dtype, device=input.device)
    N = input.numel() // math.prod(normalized_shape)
    return y, input.new_empty(N, dtype=torch.float32), input.new_empty(N, dtype=torch.float32)


def backward(
    dy: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias); one that `needs` does not ask for comes back empty and costs nothing."""
    dx, dweight, dbias = backward_outputs(dy, input, weight, bias, mean, rstd, needs)
    N = mean.numel()
    if N == 0:
        return dx, dweight.zero_(), dbias.zero_()
    C = input.numel() // N
    dy, input = dy.contiguous(), input.contiguous()
    weight = None if weight is None else weight.contiguous()
    with launch_on(input):
        for tile, gives_dx, gives_sums in backward_passes(C, needs[0], needs[1] or needs[2]):
            grid = backward_grid(N, C, tile, num_sms(input.device))
            gives = (gives_dx, needs[1] and gives_sums, needs[2] and gives_sums)
            partials = dy.new_empty(gives[1:].count(True), grid[0], C, dtype=torch.float32)
            backward_kernel[grid](
                dy,
                input,
                weight,
                mean,
                rstd,
                dx if gives[0] else None,
                partials[0] if gives[1] else None,
                partials[-1] if gives[2] else None,
                N,
                C,
                HAS_WEIGHT=weight is not None,
                NEEDS_DX=gives[0],
                NEEDS_DWEIGHT=gives[1],
                NEEDS_DBIAS=gives[2],
                BLOCK_N=tile.block_n,
                BLOCK_C=tile.block_c,
                NUM_STAGES=tile.num_stages,
                num_warps=tile.num_warps,
            )
            if gives_sums:
                sum_partials(partials, dweight if gives[1] else None, dbias if gives[2] else None)
    return dx, dweight, dbias


def sum_partials(partials: Tensor, dweight: Tensor | None, dbias: Tensor | None) -> None:
    """Adds up partials (1 or 2, P, C) over P into the gradients that are asked for."""
    _, P, C = partials.shape
    sum_partials_kernel[(triton.cdiv(C, PARTIALS.block_c),)](
        None if dweight is None else partials[0],
        None if dbias is None else partials[-1],
        dweight,
        dbias,
        P,
        C,
        NEEDS_DWEIGHT=dweight is not None,
        NEEDS_DBIAS=dbias is not None,
        BLOCK_P=PARTIALS.block_n,
        BLOCK_C=PARTIALS.block_c,
        num_warps=PARTIALS.num_warps,
    )


def backward_outputs(
    dy: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """What backward returns, before a kernel fills it."""
    dx = torch.empty(input.shape if needs[0] else (0,), dtype=input.dtype, device=input.device)
    dweight, dbias = (
        dx.new_empty(parameter.shape, dtype=parameter.dtype) if needed and parameter is not None else dx.new_empty(0)
        for parameter, needed in zip((weight, bias), needs[1:], strict=True)
    )
    return dx, dweight, dbias


LIBRARY = torch.library.Library("fastlm", "FRAGMENT")
LIBRARY.define(
    "layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "layer_norm_backward(Tensor dy, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd,"
    " bool[3] needs) -> (Tensor, Tensor, Tensor)"
)
for device in ("CUDA", "CPU"):
    LIBRARY.impl("layer_norm", forward, device)
    LIBRARY.impl("layer_norm_backward", backward, device)
torch.library.register_fake("fastlm::layer_norm", forward_outputs, lib=LIBRARY)
torch.library.register_fake("fastlm::layer_norm_backward", backward_outputs, lib=LIBRARY)
forward_op = torch.ops.fastlm.layer_norm.default
backward_op = torch.ops.fastlm.layer_norm_backward.default


class LayerNormFunction(torch.autograd.Function):
    """Joins the two raw ops into one differentiable function."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        y, mean, rstd = forward_op(input, normalized_shape, weight, bias, eps, dtype)
        ctx.save_for_backward(input, weight, bias, mean, rstd)
        ctx.normalized_shape, ctx.eps = normalized_shape, eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, mean, rstd = ctx.saved_tensors
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # create_graph=True: the raw op has no gradient of its own, so a second derivative would silently be zero.
            gradients = differentiable_gradients(dy, input, ctx.normalized_shape, weight, bias, ctx.eps, needs)
        else:
            gradients = backward_op(dy, input, weight, bias, mean, rstd, needs)
        dx, dweight, dbias = (gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))
        return dx, None, dweight, dbias, None, None


def differentiable_gradients(
    dy: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """(dx, dweight, dbias) as functions of dy, input and weight that autograd can differentiate again."""
    y = layer_norm_reference(input, normalized_shape, weight, bias, eps)
    tensors = zip((input, weight, bias), needs, strict=True)
    wanted = [tensor for tensor, needed in tensors if needed and tensor is not None]
    found = iter(torch.autograd.grad(y, wanted, dy.to(y.dtype), create_graph=True))
    return [next(found) if needed else None for needed in needs]


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
    if runs_kernels(input) and kernels_serve(input, normalized_shape, weight, bias):
        check_arguments(input, normalized_shape, weight, bias)
        # Autocast runs layer_norm in float32 on CUDA. The kernels do so anyway: only the output is not rounded.
        dtype = torch.float32 if input.is_cuda and torch.is_autocast_enabled("cuda") else input.dtype
        return LayerNormFunction.apply(input.contiguous(), normalized_shape, weight, bias, eps, dtype)
    try:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    except (RuntimeError, TypeError):
        # PyTorch has checked its arguments, ours only word the error: to check first costs a third of a small call.
        check_arguments(input, normalized_shape, weight, bias)
        raise


def kernels_serve(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the kernels can take these: their dtypes, and rows that one program holds."""
    return (
        input.dtype in DTYPES
        and not isinstance(normalized_shape, int)
        and 0 < math.prod(normalized_shape) <= MAX_C
        and (weight is None or weight.dtype in DTYPES)
        and (bias is None or bias.dtype in DTYPES)
    )


def check_arguments(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None) -> None:
    if isinstance(normalized_shape, int):
        raise TypeError(f"layer_norm: normalized_shape is an int, expected a sequence: ({normalized_shape},)")
    shape = tuple(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"layer_norm: normalized_shape is {shape}, expected the last dimensions of input, whose shape is "
            f"{tuple(input.shape)}"
        )
    if not input.is_floating_point():
        raise TypeError(f"layer_norm: input is {input.dtype}, expected a floating-point tensor; convert it first")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if parameter.shape != shape:
            raise ValueError(
                f"layer_norm: {name} has shape {tuple(parameter.shape)}, expected {shape} to match normalized_shape"
            )
        if parameter.device != input.device:
            raise ValueError(
                f"layer_norm: {name} is on {parameter.device}, expected {input.device}, where input is; move it there"
            )
        if not parameter.is_floating_point():
            raise TypeError(f"layer_norm: {name} is {parameter.dtype}, expected a floating-point tensor")
