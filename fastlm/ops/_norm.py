"""The normalisations' one family of kernels: layer norm, RMS norm, and either after a residual addition with dropout.

    h = residual + dropout(x), or x itself, rounded to the dtype in which it is kept
    mean = sum(h) / C for layer norm, 0 for RMS norm
    rstd = 1 / sqrt(sum((h - mean)^2) / C + eps)        h_hat = (h - mean) * rstd
    y = h_hat * weight + bias

    wdy = dy * weight
    dh = rstd * (wdy - sum(wdy) / C - h_hat * sum(wdy * h_hat) / C) + what comes back through h itself
    dresidual = dh        dx = dropout(dh), of the same elements        (RMS norm: without sum(wdy) / C)
    dweight = sum over rows of dy * h_hat        dbias = sum over rows of dy

Saved for backward are h, rstd and mean. All arithmetic is float32; the variance is summed over h - mean, never as
mean(h^2) - mean^2, which cancels for rows far from zero. A row up to MAX_C wide (backward: MAX_BACKWARD_C) is held by
one program and read once; a wider one is walked through in blocks, once for its sums and once to write. In backward
each of a fixed number of programs goes over its share of the rows with its own partial sums of dweight and dbias, which
a second, small kernel adds up in a fixed order, so gradients are the same on every run.

Dropout is Philox of (seed, row, column): nothing of it is stored, backward draws the same numbers again.

The error of a float32 sum grows with its length. So more programs share very many rows, and the sums along a row of
very many blocks are compensated.

On a CPU csrc/layers_cpu.cpp does the same, row by row, after PyTorch's own dropout; its partial sums are those of a
fixed number of chunks of rows.

Sources: layer_norm.py, rms_norm.py; Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3 (Philox).
"""

# mypy: disallow-untyped-defs=False
# (only the kernels have none: Triton gives their arguments types at each launch)

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops._dropout import check_dropout, kept_factor, kernel_uniform, seed_tensor, uniform
from fastlm.ops._library import as_floats, has_layer
from fastlm.ops._triton import (
    DTYPES,
    is_ordinary,
    launch_on,
    num_sms,
    num_summing_programs,
    runs_kernels,
    tl,
    triton,
)


def add_reference(x: Tensor, residual: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """residual + dropout(x) in plain PyTorch, in float32 (float64 for float64), with the kernels' own dropout."""
    wide = torch.promote_types(torch.promote_types(x.dtype, residual.dtype), torch.float32)
    added = x.to(wide) if seed is None else x.to(wide) * dropout_factors(x, x.shape[-1], dropout_p, seed)
    return (residual.to(wide) + added).to(residual.dtype)


def dropout_factors(x: Tensor, C: int, dropout_p: float, seed: Tensor) -> Tensor:
    """What dropout multiplies each element of x, rows of C, by: 0, or 1 / (1 - dropout_p). Only x's shape matters.

    Philox with four 32-bit counters: column / 4, row, 0, 0. Its four numbers serve four columns.
    """
    row = torch.arange(x.numel() // max(C, 1), device=x.device)[:, None]
    column = torch.arange(-(-C // 4), device=x.device)[None, :]
    zero = torch.zeros_like(column)
    drawn = uniform(seed, column, row, zero, zero)[:, :C]
    return torch.where(drawn >= dropout_p, kept_factor(dropout_p), 0.0).reshape(x.shape)


@triton.jit
def kernel_dropout_factors(seed, dropout_p, factor, rows, start, BLOCK_C: tl.constexpr):
    """dropout_factors of columns start .. start + BLOCK_C of these rows."""
    columns = start // 4 + tl.arange(0, BLOCK_C // 4)
    drawn = kernel_uniform(seed, columns[None, :], rows[:, None], 0, 0, rows.shape[0], BLOCK_C)
    return tl.where(drawn >= dropout_p, factor, 0.0)


@triton.jit
def load_added(
    x_ptr, residual_ptr, sum_ptr, seed, dropout_p, factor, rows, start, offsets, mask, BLOCK_C: tl.constexpr
):
    """h, which is stored where it is a sum."""
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if seed is not None:
        x *= kernel_dropout_factors(seed, dropout_p, factor, rows, start, BLOCK_C)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        # Rounded before it is normalised: the gradient is then that of what backward reads.
        h = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + offsets, h, mask=mask)
        x = h.to(tl.float32)
    return x


@triton.jit
def add_compensated(total, excess, x):
    """(total + x, by how much that exceeds the exact sum, which the next call takes off): Kahan's summation."""
    x -= excess
    larger = total + x
    excess = (larger - total) - x
    return larger, tl.where(tl.abs(excess) < float("inf"), excess, 0.0)  # else an infinite sum would become NaN


@triton.jit
def load_vector(ptrs, mask):
    """(1, BLOCK_C) of weight or bias."""
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)[None, :]


@triton.jit
def store_scaled(h_hat, weight_ptr, bias_ptr, y_ptr, cols, offsets, mask, C):
    y = h_hat
    if weight_ptr is not None:
        y *= load_vector(weight_ptr + cols, cols < C)
    if bias_ptr is not None:
        y += load_vector(bias_ptr + cols, cols < C)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def forward_kernel(
    x_ptr,  # (N, C)
    residual_ptr,  # (N, C) or None
    weight_ptr,  # (C,) or None
    bias_ptr,  # (C,) or None
    seed_ptr,  # one int64, or None
    dropout_p,
    factor,  # of what dropout keeps
    y_ptr,  # (N, C)
    sum_ptr,  # (N, C), or None without residual
    mean_ptr,  # (N,), or None for RMS norm
    rstd_ptr,  # (N,)
    N,
    C,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    IS_WALKED: tl.constexpr,  # a row wider than the block, in two walks: for its sums, and to write
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_C)
    in_row = (cols < C)[None, :]
    mask = (rows < N)[:, None] & in_row
    offsets = rows.to(tl.int64)[:, None] * C + cols[None, :]
    seed = None if seed_ptr is None else tl.load(seed_ptr)

    h = load_added(x_ptr, residual_ptr, sum_ptr, seed, dropout_p, factor, rows, 0, offsets, mask, BLOCK_C)
    # The rounding of a first mean would show in rows far from zero: 3.7, 3.7, ... must give 0. So all that follows is
    # of h - shift, whose mean is the correction, and comes with the variance: both sums wait for the same barrier.
    shift = tl.zeros([BLOCK_N, 1], tl.float32)
    mean = tl.zeros([BLOCK_N, 1], tl.float32)
    count = tl.minimum(C, BLOCK_C)
    if mean_ptr is not None:
        shift = tl.sum(h, axis=1)[:, None] / count
        h = tl.where(in_row, h - shift, 0.0)  # padding would add shift^2 to the variance
        mean = tl.sum(h, axis=1)[:, None] / count
    squares = tl.sum(h * h, axis=1)[:, None]
    # Of huge numbers both squares are infinite, and rstd shall be 0, as in PyTorch, not NaN.
    squares -= tl.where(squares < float("inf"), mean * mean * count, 0.0)
    if IS_WALKED:
        excess = tl.zeros([BLOCK_N, 1], tl.float32)
        for start in range(BLOCK_C, C, BLOCK_C):
            in_row = (start + cols < C)[None, :]
            mask = (rows < N)[:, None] & in_row
            h = load_added(
                x_ptr, residual_ptr, sum_ptr, seed, dropout_p, factor, rows, start, offsets + start, mask, BLOCK_C
            )
            if mean_ptr is not None:  # Chan's rule for the moments of two sets
                count = tl.minimum(C - start, BLOCK_C)
                share = count / (start + count)
                h = tl.where(in_row, h - shift, 0.0)
                distance = tl.sum(h, axis=1)[:, None] / count - mean
                h = tl.where(in_row, h - mean - distance, 0.0)
                squares, excess = add_compensated(squares, excess, distance * distance * start * share)
                mean += distance * share
            squares, excess = add_compensated(squares, excess, tl.sum(h * h, axis=1)[:, None])
    # Not tl.maximum: on a GPU that of NaN and 0 is 0, and a row that holds a NaN would pass as a healthy one.
    rstd = 1.0 / tl.sqrt(tl.where(squares < 0.0, 0.0, squares / C) + eps)

    if IS_WALKED:
        tl.debug_barrier()  # a sum is read by another thread than wrote it, where layouts differ
        for start in range(0, C, BLOCK_C):
            mask = (rows < N)[:, None] & (start + cols < C)[None, :]
            h_ptr = x_ptr if sum_ptr is None else sum_ptr
            h = tl.load(h_ptr + offsets + start, mask=mask, other=0.0).to(tl.float32) - shift
            store_scaled((h - mean) * rstd, weight_ptr, bias_ptr, y_ptr, start + cols, offsets + start, mask, C)
    else:
        store_scaled((h - mean) * rstd, weight_ptr, bias_ptr, y_ptr, cols, offsets, mask, C)
    tl.store(rstd_ptr + rows[:, None], rstd, mask=(rows < N)[:, None])
    if mean_ptr is not None:
        tl.store(mean_ptr + rows[:, None], shift + mean, mask=(rows < N)[:, None])


@triton.jit
def load_backward(dy_ptr, h_ptr, weight, mean, rstd, offsets, mask):
    """(dy, dy * weight, h_hat); padding columns hold an h_hat of -mean * rstd, but there dy is 0."""
    dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    wdy = dy if weight is None else dy * weight
    h_hat = h * rstd if mean is None else (h - mean) * rstd
    return dy, wdy, h_hat


@triton.jit
def normalisation_gradient(wdy, h_hat, sum_wdy, sum_wdy_h_hat, mean, rstd, C):
    centered = wdy if mean is None else wdy - sum_wdy / C
    return (centered - h_hat * (sum_wdy_h_hat / C)) * rstd


@triton.jit
def store_backward(
    dh, dsum_ptr, dx_ptr, dresidual_ptr, seed, dropout_p, factor, rows, start, offsets, mask, BLOCK_C: tl.constexpr
):
    """The gradients of what was added up into h, given the one that comes back through its normalisation."""
    if dsum_ptr is not None:
        dh += tl.load(dsum_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + offsets, dh.to(dresidual_ptr.dtype.element_ty), mask=mask)
    if dx_ptr is not None:
        if seed is not None:
            dh *= kernel_dropout_factors(seed, dropout_p, factor, rows, start, BLOCK_C)
        tl.store(dx_ptr + offsets, dh.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def walk_back(
    dy_ptr, dsum_ptr, h_ptr, weight_ptr, mean, rstd, seed, dropout_p, factor, dx_ptr, dresidual_ptr,
    rows, cols, offsets, N, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """backward_kernel's work on rows wider than a block, in two walks: one for the sums, one to write."""
    sum_wdy = tl.zeros([BLOCK_N, 1], tl.float32)
    sum_wdy_h_hat = tl.zeros([BLOCK_N, 1], tl.float32)
    excess = tl.zeros([BLOCK_N, 1], tl.float32)
    excess_h_hat = tl.zeros([BLOCK_N, 1], tl.float32)
    for start in range(0, C, BLOCK_C):
        in_row = start + cols < C
        mask = (rows < N)[:, None] & in_row[None, :]
        weight = None if weight_ptr is None else load_vector(weight_ptr + start + cols, in_row)
        _, wdy, h_hat = load_backward(dy_ptr, h_ptr, weight, mean, rstd, offsets + start, mask)
        sum_wdy, excess = add_compensated(sum_wdy, excess, tl.sum(wdy, axis=1)[:, None])
        wdy_h_hat = tl.sum(wdy * h_hat, axis=1)[:, None]
        sum_wdy_h_hat, excess_h_hat = add_compensated(sum_wdy_h_hat, excess_h_hat, wdy_h_hat)
    for start in range(0, C, BLOCK_C):
        in_row = start + cols < C
        mask = (rows < N)[:, None] & in_row[None, :]
        weight = None if weight_ptr is None else load_vector(weight_ptr + start + cols, in_row)
        _, wdy, h_hat = load_backward(dy_ptr, h_ptr, weight, mean, rstd, offsets + start, mask)
        dh = normalisation_gradient(wdy, h_hat, sum_wdy, sum_wdy_h_hat, mean, rstd, C)
        store_backward(
            dh, dsum_ptr, dx_ptr, dresidual_ptr, seed, dropout_p, factor, rows, start, offsets + start, mask, BLOCK_C
        )


@triton.jit
def backward_kernel(
    dy_ptr,  # (N, C)
    dsum_ptr,  # (N, C): the gradient that comes back through h itself, or None
    h_ptr,  # (N, C)
    weight_ptr,  # (C,) or None
    mean_ptr,  # (N,), or None for RMS norm
    rstd_ptr,  # (N,)
    seed_ptr,  # one int64, or None
    dropout_p,
    factor,  # of what dropout keeps
    dx_ptr,  # (N, C), or None when nobody asked, as the next three
    dresidual_ptr,  # (N, C)
    dweight_ptr,  # (programs, C) float32
    dbias_ptr,  # (programs, C) float32
    N,
    C,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    IS_WALKED: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    # In one dimension: y and z of a grid end at 65,535, which either count may exceed.
    across = 1 if IS_WALKED else tl.cdiv(C, BLOCK_C)
    program, down = tl.program_id(0) // across, tl.num_programs(0) // across
    cols = tl.program_id(0) % across * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = cols < C
    seed = None if seed_ptr is None else tl.load(seed_ptr)
    weight = None if weight_ptr is None else load_vector(weight_ptr + cols, in_row)
    dweight = tl.zeros([BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_C], tl.float32)

    for block in tl.range(program, tl.cdiv(N, BLOCK_N), down, num_stages=NUM_STAGES):
        rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
        offsets = rows.to(tl.int64)[:, None] * C + cols[None, :]
        mean = None if mean_ptr is None else tl.load(mean_ptr + rows, mask=rows < N, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < N, other=0.0)[:, None]
        if IS_WALKED:
            walk_back(
                dy_ptr, dsum_ptr, h_ptr, weight_ptr, mean, rstd, seed, dropout_p, factor, dx_ptr, dresidual_ptr,
                rows, cols, offsets, N, C, BLOCK_N, BLOCK_C,
            )  # fmt: skip
        else:
            mask = (rows < N)[:, None] & in_row[None, :]
            dy, wdy, h_hat = load_backward(dy_ptr, h_ptr, weight, mean, rstd, offsets, mask)
            if dx_ptr is not None or dresidual_ptr is not None:
                sum_wdy = tl.sum(wdy, axis=1)[:, None]
                sum_wdy_h_hat = tl.sum(wdy * h_hat, axis=1)[:, None]
                dh = normalisation_gradient(wdy, h_hat, sum_wdy, sum_wdy_h_hat, mean, rstd, C)
                store_backward(
                    dh, dsum_ptr, dx_ptr, dresidual_ptr, seed, dropout_p, factor, rows, 0, offsets, mask, BLOCK_C
                )
            if dweight_ptr is not None:
                dweight += tl.sum(dy * h_hat, axis=0)
            if dbias_ptr is not None:
                dbias += tl.sum(dy, axis=0)

    if dweight_ptr is not None:
        tl.store(dweight_ptr + program.to(tl.int64) * C + cols, dweight, mask=in_row)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + program.to(tl.int64) * C + cols, dbias, mask=in_row)


@triton.jit
def sum_partials_kernel(
    dweight_partials_ptr,  # (P, C) float32, or None
    dbias_partials_ptr,  # (P, C) float32, or None
    dweight_ptr,  # (C,) or None
    dbias_ptr,  # (C,) or None
    P,
    C,
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
        if dweight_ptr is not None:
            dweight += tl.load(dweight_partials_ptr + offsets, mask=mask, other=0.0)
        if dbias_ptr is not None:
            dbias += tl.load(dbias_partials_ptr + offsets, mask=mask, other=0.0)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + cols, tl.sum(dweight, axis=0).to(dweight_ptr.dtype.element_ty), mask=cols < C)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + cols, tl.sum(dbias, axis=0).to(dbias_ptr.dtype.element_ty), mask=cols < C)


class Tile(NamedTuple):
    """How much of (N, C) one turn of one program takes, with how many warps, and how many turns are in flight."""

    block_n: int
    block_c: int
    num_warps: int
    num_stages: int = 1


class Pass(NamedTuple):
    """One launch of the backward kernel, and which gradients it gives: of the rows, or sums over them."""

    tile: Tile
    gives_rows: bool
    gives_sums: bool


MAX_C = 16384  # a program cannot hold a wider row in registers: it would spill
MAX_BACKWARD_C = 8192  # the same with the gradient, weight, dweight and dbias beside the row
MAX_DROPOUT_C = 4096  # and with numbers drawn beside them
FORWARD_WALK = Tile(1, 8192, 8)  # how a program goes through wider rows
BACKWARD_WALK = Tile(1, 4096, 8)
COLUMNS = Tile(4, 1024, 4, 2)  # for dweight and dbias alone: columns are independent, so a program need not hold a row
PARTIALS = Tile(128, 32, 4)


def forward_tile(C: int, is_added: bool) -> Tile:
    """One row, or as many short ones as put four 16-byte loads of bfloat16 into flight per thread, of all inputs."""
    if C > MAX_C:
        return FORWARD_WALK
    block_c = max(64, triton.next_power_of_2(C))
    return Tile(min(16, max(1, (2048 if is_added else 4096) // block_c)), block_c, max(4, block_c // 1024))


def backward_passes(C: int, needs_rows: bool, needs_sums: bool, drops: bool) -> list[Pass]:
    """One pass over h and dy, or two for wide rows. Few elements per thread: each has five values or more."""
    block_c = max(64, triton.next_power_of_2(C))
    num_warps = 4 if block_c <= 1024 else 8 if block_c <= 4096 else 16
    block_n = min(16, max(1, (2048 if drops else 4096) // block_c))
    rows = Tile(block_n, block_c, num_warps, 2) if C <= MAX_BACKWARD_C else BACKWARD_WALK
    if (MAX_DROPOUT_C if drops else MAX_BACKWARD_C) >= C:
        return [Pass(rows, needs_rows, needs_sums)]
    return [Pass(rows, True, False)] * needs_rows + [Pass(COLUMNS, False, True)] * needs_sums


def backward_grid(N: int, C: int, given: Pass, num_sms: int) -> tuple[int, int]:
    """(across the columns, down the rows): as many as run at once, 16 warps on an SM: more leave more partial sums."""
    tile = given.tile
    across = 1 if given.gives_rows else triton.cdiv(C, tile.block_c)
    at_once = triton.cdiv(num_sms * (16 // tile.num_warps), across)
    return across, num_summing_programs(triton.cdiv(N, tile.block_n), at_once)


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
    """(y of that dtype, h or nothing without residual, mean (N,) or nothing without one, rstd (N,)) of x (..., C)."""
    y, h, mean, rstd = forward_outputs(
        x, residual, normalized_shape, weight, bias, seed, dropout_p, eps, has_mean, dtype
    )
    C, N = math.prod(normalized_shape), rstd.numel()
    if N == 0:
        return y, h, mean, rstd
    if x.is_cpu and not runs_kernels(x):
        parameters = as_floats(weight), as_floats(bias)
        outputs = y, None if residual is None else h, mean if has_mean else None, rstd
        torch.ops.fastlm.norm_rows(x.contiguous(), contiguous(residual), *parameters, eps, *outputs)
        return y, h, mean, rstd
    tile = forward_tile(C, residual is not None)
    with launch_on(x):
        forward_kernel[(triton.cdiv(N, tile.block_n),)](
            x.contiguous(),
            contiguous(residual),
            contiguous(weight),
            contiguous(bias),
            seed,
            dropout_p,
            kept_factor(dropout_p),
            y,
            None if residual is None else h,
            mean if has_mean else None,
            rstd,
            N,
            C,
            eps,
            BLOCK_N=tile.block_n,
            BLOCK_C=tile.block_c,
            IS_WALKED=tile.block_c < C,
            num_warps=tile.num_warps,
        )
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
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    h = x.new_empty(0) if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    N = x.numel() // math.prod(normalized_shape)
    mean, rstd = (x.new_empty(size, dtype=torch.float32) for size in (N if has_mean else 0, N))
    return y, h, mean, rstd


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
    """(dx of that dtype, dresidual, dweight, dbias); one that `needs` does not ask for is empty and costs nothing."""
    outputs = backward_outputs(dy, dsum, h, weight, bias, mean, rstd, seed, dropout_p, dtype, needs)
    dx, dresidual, dweight, dbias = outputs
    N = rstd.numel()
    if N == 0:
        return dx, dresidual, dweight.zero_(), dbias.zero_()
    if h.is_cpu and not runs_kernels(h):
        wanted = [output if needed else None for output, needed in zip(outputs, needs, strict=True)]
        torch.ops.fastlm.norm_backward_rows(
            dy.contiguous(), contiguous(dsum), h.contiguous(), as_floats(weight), mean, rstd, *wanted
        )
        return outputs
    C = h.numel() // N
    inputs = (dy.contiguous(), contiguous(dsum), h.contiguous(), contiguous(weight), mean, rstd, seed)
    with launch_on(h):
        for given in backward_passes(C, needs[0] or needs[1], needs[2] or needs[3], seed is not None):
            tile, gives_rows, gives_sums = given
            across, down = backward_grid(N, C, given, num_sms(h.device))
            gives_dweight, gives_dbias = needs[2] and gives_sums, needs[3] and gives_sums
            partials = rstd.new_empty(gives_dweight + gives_dbias, down, C)
            backward_kernel[(across * down,)](
                *inputs,
                dropout_p,
                kept_factor(dropout_p),
                dx if gives_rows and needs[0] else None,
                dresidual if gives_rows and needs[1] else None,
                partials[0] if gives_dweight else None,
                partials[-1] if gives_dbias else None,
                N,
                C,
                BLOCK_N=tile.block_n,
                BLOCK_C=tile.block_c,
                IS_WALKED=gives_rows and tile.block_c < C,
                NUM_STAGES=tile.num_stages,
                num_warps=tile.num_warps,
            )
            if gives_sums:
                sum_partials(partials, dweight if gives_dweight else None, dbias if gives_dbias else None)
    return outputs


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
        BLOCK_P=PARTIALS.block_n,
        BLOCK_C=PARTIALS.block_c,
        num_warps=PARTIALS.num_warps,
    )


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
    dx = torch.empty(h.shape if needs[0] else (0,), dtype=dtype, device=h.device)
    dresidual = torch.empty(h.shape if needs[1] else (0,), dtype=h.dtype, device=h.device)
    dweight, dbias = (
        dx.new_empty(parameter.shape, dtype=parameter.dtype) if needed and parameter is not None else dx.new_empty(0)
        for parameter, needed in zip((weight, bias), needs[2:], strict=True)
    )
    return dx, dresidual, dweight, dbias


def dropout_noise(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """dropout_factors where no kernel runs: of x's dtype, and drawn by PyTorch's generator, which is faster there."""
    generator = torch.Generator(x.device).manual_seed(int(seed))
    noise = torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(1.0 - dropout_p, generator=generator)
    return noise.mul_(kept_factor(dropout_p))


LIBRARY = torch.library.Library("fastlm", "FRAGMENT")
LIBRARY.define(
    "norm(Tensor x, Tensor? residual, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, Tensor? seed,"
    " float dropout_p, float eps, bool has_mean, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "norm_backward(Tensor dy, Tensor? dsum, Tensor h, Tensor? weight, Tensor? bias, Tensor? mean, Tensor rstd,"
    " Tensor? seed, float dropout_p, ScalarType dtype, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define("dropout_noise(Tensor x, float dropout_p, Tensor seed) -> Tensor")
for device in ("CUDA", "CPU"):
    LIBRARY.impl("norm", forward, device)
    LIBRARY.impl("norm_backward", backward, device)
LIBRARY.impl("dropout_noise", dropout_noise, "CompositeExplicitAutograd")  # PyTorch's code, on any device
torch.library.register_fake("fastlm::norm", forward_outputs, lib=LIBRARY)
torch.library.register_fake("fastlm::norm_backward", backward_outputs, lib=LIBRARY)
torch.library.register_fake("fastlm::dropout_noise", lambda x, dropout_p, seed: x.new_empty(x.shape), lib=LIBRARY)
forward_op = torch.ops.fastlm.norm.default
backward_op = torch.ops.fastlm.norm_backward.default
dropout_noise_op = torch.ops.fastlm.dropout_noise.default
Reference = Callable[..., Tensor]


class NormFunction(torch.autograd.Function):
    """Joins the two raw ops into one differentiable function: of x, or of x and residual, when it gives h too."""

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
        # Without dropout and in one dtype the gradients of x and residual are the same numbers: they share a tensor.
        is_shared = asked[0] and asked[1] and seed is None and ctx.dtype == h.dtype
        needs = [asked[0], asked[1] and not is_shared, *asked[2:]]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # create_graph=True: the raw op has no gradient of its own, so a second derivative would silently be zero.
            gradients = differentiable_gradients(ctx, dy, dsum, h, weight, bias, seed, needs)
        else:
            gradients = backward_op(dy, dsum, h, weight, bias, mean, rstd, seed, ctx.dropout_p, ctx.dtype, needs)
        dx, dresidual, dweight, dbias = (
            gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)
        )
        return dx, dx if is_shared else dresidual, None, dweight, dbias, None, None, None, None, None, None


def differentiable_gradients(
    ctx: Any,
    dy: Tensor,
    dsum: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """(dx, dresidual, dweight, dbias) as functions of dy, dsum, h and weight that autograd can differentiate again."""
    # Of aliases: h may itself be made of weight, and the gradient of weight would then run through h a second time.
    h = h.view_as(h)
    weight, bias = (None if tensor is None else tensor.view_as(tensor) for tensor in (weight, bias))
    y = ctx.reference(h, ctx.normalized_shape, weight, eps=ctx.eps, **({} if bias is None else {"bias": bias}))
    tensors = zip((h, weight, bias), (needs[0] or needs[1], *needs[2:]), strict=True)
    wanted = [tensor if needed else None for tensor, needed in tensors]
    given = [tensor for tensor in wanted if tensor is not None]
    found = iter(torch.autograd.grad(y, given, dy.to(y.dtype), create_graph=True))
    dh, dweight, dbias = (None if tensor is None else next(found) for tensor in wanted)
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
) -> Any:
    """y, or (y, h) with residual, of arguments that kernels_serve."""
    # Autocast runs these norms in float32 on CUDA. The kernels do so anyway: only the output is not rounded.
    dtype = torch.float32 if x.is_cuda and torch.is_autocast_enabled("cuda") else x.dtype
    if dropout_p and not runs_kernels(x):
        x, dropout_p = drop(x, dropout_p, seed), 0.0
    return NormFunction.apply(
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


def kernels_serve(op: str, x: Tensor, normalized_shape: Sequence[int], *others: Tensor | None) -> bool:
    """Whether Triton's kernels, or on a CPU the compiled ones, can take these: their device, kind and dtypes."""
    return (
        (runs_kernels(x) or has_layer(op, x))
        and x.dtype in DTYPES
        and not isinstance(normalized_shape, int)
        and math.prod(normalized_shape) > 0
        and all(tensor is None or tensor.dtype in DTYPES for tensor in others)
        and is_ordinary(x, *others)
    )


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
