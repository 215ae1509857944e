"""The Triton kernels of the norms: layer norm, RMS norm, and either after a residual addition with dropout.

Names and formulas are those of norm.py. A program holds a row of up to MAX_C elements in registers (backward:
MAX_BACKWARD_C) and reads it once; forward in blocks, so that little of a width that is no power of 2 is padding, and up
to MAX_WARP_C a warp has rows of its own and waits for no other. A wider row is read twice: for its sums, and to write.
The variance is summed over h - mean, never as mean(h^2) - mean^2, which cancels for rows far from zero. In backward a
fixed number of programs share the rows; each has its own partial sums of dweight and dbias, which a second, small
kernel adds up in a fixed order, so gradients are the same on every run.

The error of a float32 sum grows with its length. So more programs share very many rows, and the sums along a row of
very many blocks are compensated.
"""

# mypy: disallow-untyped-defs=False
# (only the kernels have none: Triton gives their arguments types at each launch)

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastlm.ops._dropout import Dropout, kept_factor, kernel_is_kept
from fastlm.ops._launch import launch, launch_on
from fastlm.ops._triton import (
    DYNAMIC_SIZES,
    cdiv,
    multiple_of_16,
    next_power_of_2,
    num_row_programs,
    num_sms,
    tl,
    triton,
)

# What the kernels take, in groups


class Addition(NamedTuple):
    """h = residual + dropout(x), which is stored; or h = x, with neither residual nor a place to store h."""

    x_ptr: Any  # (N, C)
    residual_ptr: Any  # (N, C) or None
    h_ptr: Any  # (N, C) or None


class Affine(NamedTuple):
    weight_ptr: Any  # (C,) or None
    bias_ptr: Any  # (C,) or None


class Stats(NamedTuple):
    """The statistics of each row."""

    mean_ptr: Any  # (N,), or None for RMS norm
    rstd_ptr: Any  # (N,)


class Saved(NamedTuple):
    """What backward reads, beside the statistics."""

    dy_ptr: Any  # (N, C)
    dsum_ptr: Any  # (N, C): the gradient of h as an output of its own, or None
    h_ptr: Any  # (N, C)
    weight_ptr: Any  # (C,) or None


class Gradients(NamedTuple):
    """What backward writes; None is not needed."""

    dx_ptr: Any  # (N, C)
    dresidual_ptr: Any  # (N, C)
    dweight_ptr: Any  # (programs, C) float32: partial sums
    dbias_ptr: Any  # the same


# Forward


@triton.jit
def kernel_dropout_factors(seed, dropout, rows, start, BLOCK_C: tl.constexpr):
    """dropout_factors of columns start .. start + BLOCK_C of these rows."""
    groups = start // 4 + tl.arange(0, BLOCK_C // 4)
    counters = rows[:, None].to(tl.int32)  # philox takes no counters of two widths, and beyond 2^31 rows are of 64 bits
    kept = kernel_is_kept(dropout, seed, groups[None, :], counters, 0, 0, rows.shape[0], BLOCK_C)
    return tl.where(kept, dropout.kept_factor, 0.0)


@triton.jit
def load_sum(addition, seed, dropout, rows, start, offsets, mask, BLOCK_C: tl.constexpr):
    """h, stored if it is a sum."""
    h = tl.load(addition.x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if seed is not None:
        h *= kernel_dropout_factors(seed, dropout, rows, start, BLOCK_C)
    if addition.residual_ptr is not None:
        h += tl.load(addition.residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        # h is rounded before it is normalised, because backward reads the rounded h.
        rounded = h.to(addition.h_ptr.dtype.element_ty)
        tl.store(addition.h_ptr + offsets, rounded, mask=mask)
        h = rounded.to(tl.float32)
    return h


@triton.jit
def add_compensated(total, excess, x):
    """(total + x, by how much that exceeds the exact sum, which the next call subtracts): Kahan's summation."""
    x -= excess
    larger = total + x
    excess = (larger - total) - x
    return larger, tl.where(tl.abs(excess) < float("inf"), excess, 0.0)  # else an infinite sum would become NaN


@triton.jit
def load_vector(ptrs, mask):
    """(1, BLOCK_C) of weight or bias."""
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)[None, :]


@triton.jit
def store_scaled(h_hat, affine, y_ptr, cols, offsets, mask):
    """Each row loads the vectors anew, from a cache: loaded once, they would go to all warps through shared memory."""
    y = h_hat
    if affine.weight_ptr is not None:
        weight_ptrs = tl.broadcast_to((affine.weight_ptr + cols)[None, :], h_hat.shape)
        y *= tl.load(weight_ptrs, mask=mask, other=0.0).to(tl.float32)
    if affine.bias_ptr is not None:
        bias_ptrs = tl.broadcast_to((affine.bias_ptr + cols)[None, :], h_hat.shape)
        y += tl.load(bias_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def first_moments(blocks, total, in_row, count, NUM_BLOCKS: tl.constexpr, HAS_MEAN: tl.constexpr):
    """(h - shift, shift, the mean and the sum of squares of h - shift), where a row has `count` elements.

    blocks  of h, side by side; in_row is of the last one, which alone may hold padding, zeros
    total   their sum

    shift is a first mean. Its rounding would show in rows far from zero: 3.7, 3.7, ... must give 0. So everything else
    uses h - shift, whose mean corrects it and is reduced together with the variance, at one barrier.
    """
    shift = tl.zeros([total.shape[0], 1], tl.float32)
    mean = tl.zeros([total.shape[0], 1], tl.float32)
    per_element = 1.0 / count  # one division a row: on a GPU each takes a dozen instructions
    if HAS_MEAN:
        shift = tl.sum(total, axis=1)[:, None] * per_element
    shifted = ()
    sums = tl.zeros_like(total)
    products = tl.zeros_like(total)
    for block in tl.static_range(NUM_BLOCKS):
        h = blocks[block]
        if HAS_MEAN:
            h -= shift
            if block + 1 == NUM_BLOCKS:
                h = tl.where(in_row, h, 0.0)  # padding would add shift^2 to the variance
            sums += h
        products += h * h
        shifted = shifted + (h,)  # type: ignore[assignment]  # noqa: RUF005 Triton knows no starred expression
    if HAS_MEAN:
        mean = tl.sum(sums, axis=1)[:, None] * per_element
    squares = tl.sum(products, axis=1)[:, None]
    # Both terms overflow to inf for huge h. rstd must then be 0, as in PyTorch; inf - inf would make it NaN.
    squares -= tl.where(squares < float("inf"), mean * mean * count, 0.0)
    return shifted, shift, mean, squares


@triton.jit
def add_moments(
    mean, squares, shift, addition, seed, dropout, rows, cols, offsets, N, C, BLOCK_C: tl.constexpr,
    HAS_MEAN: tl.constexpr,
):  # fmt: skip
    """first_moments of whole rows, given those of their first block."""
    excess = tl.zeros([rows.shape[0], 1], tl.float32)
    for start in range(BLOCK_C, C, BLOCK_C):
        in_row = (start + cols < C)[None, :]
        mask = (rows < N)[:, None] & in_row
        h = load_sum(addition, seed, dropout, rows, start, offsets + start, mask, BLOCK_C)
        if HAS_MEAN:  # Chan's rule for the moments of two sets
            count = tl.minimum(C - start, BLOCK_C)
            share = count / (start + count)
            h = tl.where(in_row, h - shift, 0.0)
            distance = tl.sum(h, axis=1)[:, None] / count - mean
            h = tl.where(in_row, h - mean - distance, 0.0)
            squares, excess = add_compensated(squares, excess, distance * distance * start * share)
            mean += distance * share
        squares, excess = add_compensated(squares, excess, tl.sum(h * h, axis=1)[:, None])
    return mean, squares


@triton.jit(do_not_specialize=DYNAMIC_SIZES)
def forward_kernel(
    addition,
    affine,
    dropout,
    y_ptr,  # (N, C)
    stats,
    N,
    C,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,  # of a row in registers
    MULTI_BLOCK: tl.constexpr,  # a row is wider than these, and read twice
):
    HAS_MEAN: tl.constexpr = stats.mean_ptr is not None
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_C)
    in_row = (NUM_BLOCKS - 1) * BLOCK_C + cols < C  # of the last block
    offsets = rows.to(tl.int64)[:, None] * C + cols[None, :]
    seed = None if dropout.seed_ptr is None else tl.load(dropout.seed_ptr)

    blocks = ()
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for block in tl.static_range(NUM_BLOCKS):
        mask = (rows < N)[:, None] & (in_row[None, :] if block + 1 == NUM_BLOCKS else True)
        h = load_sum(addition, seed, dropout, rows, block * BLOCK_C, offsets + block * BLOCK_C, mask, BLOCK_C)
        blocks = blocks + (h,)  # type: ignore[assignment]  # noqa: RUF005
        total += h
    count = tl.minimum(C, NUM_BLOCKS * BLOCK_C)
    blocks, shift, mean, squares = first_moments(blocks, total, in_row[None, :], count, NUM_BLOCKS, HAS_MEAN)
    if MULTI_BLOCK:
        mean, squares = add_moments(
            mean, squares, shift, addition, seed, dropout, rows, cols, offsets, N, C, BLOCK_C, HAS_MEAN
        )
    # tl.maximum(NaN, 0) is 0 on a GPU: it would make a row that holds a NaN look healthy.
    rstd = tl.rsqrt(tl.where(squares < 0.0, 0.0, squares / C) + eps)

    if MULTI_BLOCK:
        h_ptr = addition.x_ptr if addition.h_ptr is None else addition.h_ptr
        tl.debug_barrier()  # where layouts differ, another thread reads an element of h than wrote it
        for start in range(0, C, BLOCK_C):
            mask = (rows < N)[:, None] & (start + cols < C)[None, :]
            h = tl.load(h_ptr + offsets + start, mask=mask, other=0.0).to(tl.float32) - shift
            store_scaled((h - mean) * rstd, affine, y_ptr, start + cols, offsets + start, mask)
    else:
        for block in tl.static_range(NUM_BLOCKS):
            mask = (rows < N)[:, None] & (in_row[None, :] if block + 1 == NUM_BLOCKS else True)
            start = block * BLOCK_C
            store_scaled((blocks[block] - mean) * rstd, affine, y_ptr, start + cols, offsets + start, mask)
    tl.store(stats.rstd_ptr + rows[:, None], rstd, mask=(rows < N)[:, None])
    if HAS_MEAN:
        tl.store(stats.mean_ptr + rows[:, None], shift + mean, mask=(rows < N)[:, None])


# Backward


@triton.jit
def load_backward(saved, weight, mean, rstd, offsets, mask):
    """(dy, dy * weight, h_hat); padding columns hold an h_hat of -mean * rstd, but there dy is 0."""
    dy = tl.load(saved.dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    h = tl.load(saved.h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    wdy = dy if weight is None else dy * weight
    h_hat = h * rstd if mean is None else (h - mean) * rstd
    return dy, wdy, h_hat


@triton.jit
def normalisation_gradient(wdy, h_hat, sum_wdy, sum_wdy_h_hat, mean, rstd, C):
    centered = wdy if mean is None else wdy - sum_wdy / C
    return (centered - h_hat * (sum_wdy_h_hat / C)) * rstd


@triton.jit
def store_backward(dh, dsum_ptr, gradients, seed, dropout, rows, start, offsets, mask, BLOCK_C: tl.constexpr):
    """Stores dx and dresidual, given the gradient of h that comes back through its normalisation."""
    if dsum_ptr is not None:
        dh += tl.load(dsum_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if gradients.dresidual_ptr is not None:
        tl.store(gradients.dresidual_ptr + offsets, dh.to(gradients.dresidual_ptr.dtype.element_ty), mask=mask)
    if gradients.dx_ptr is not None:
        if seed is not None:
            dh *= kernel_dropout_factors(seed, dropout, rows, start, BLOCK_C)
        tl.store(gradients.dx_ptr + offsets, dh.to(gradients.dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_multi_block(saved, mean, rstd, gradients, seed, dropout, rows, cols, offsets, N, C, BLOCK_C: tl.constexpr):
    """dx and dresidual of rows wider than a block: one loop for the sums along a row, one to write."""
    sum_wdy = tl.zeros([rows.shape[0], 1], tl.float32)
    sum_wdy_h_hat = tl.zeros([rows.shape[0], 1], tl.float32)
    excess = tl.zeros([rows.shape[0], 1], tl.float32)
    excess_h_hat = tl.zeros([rows.shape[0], 1], tl.float32)
    for start in range(0, C, BLOCK_C):
        in_row = start + cols < C
        mask = (rows < N)[:, None] & in_row[None, :]
        weight = None if saved.weight_ptr is None else load_vector(saved.weight_ptr + start + cols, in_row)
        _, wdy, h_hat = load_backward(saved, weight, mean, rstd, offsets + start, mask)
        sum_wdy, excess = add_compensated(sum_wdy, excess, tl.sum(wdy, axis=1)[:, None])
        wdy_h_hat = tl.sum(wdy * h_hat, axis=1)[:, None]
        sum_wdy_h_hat, excess_h_hat = add_compensated(sum_wdy_h_hat, excess_h_hat, wdy_h_hat)
    for start in range(0, C, BLOCK_C):
        in_row = start + cols < C
        mask = (rows < N)[:, None] & in_row[None, :]
        weight = None if saved.weight_ptr is None else load_vector(saved.weight_ptr + start + cols, in_row)
        _, wdy, h_hat = load_backward(saved, weight, mean, rstd, offsets + start, mask)
        dh = normalisation_gradient(wdy, h_hat, sum_wdy, sum_wdy_h_hat, mean, rstd, C)
        store_backward(dh, saved.dsum_ptr, gradients, seed, dropout, rows, start, offsets + start, mask, BLOCK_C)


@triton.jit(do_not_specialize=DYNAMIC_SIZES)
def backward_kernel(
    saved,
    stats,
    dropout,
    gradients,
    N,
    C,
    ALIGNED_N: tl.constexpr,  # N is a multiple of 16: mean and rstd of several rows are loaded at once
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MULTI_BLOCK: tl.constexpr,  # of dx and dresidual, whose rows are then wider than BLOCK_C
    NUM_STAGES: tl.constexpr,
):
    if ALIGNED_N:
        N = multiple_of_16(N)
    # In one dimension: y and z of a grid end at 65,535, which either count may exceed.
    col_blocks = 1 if MULTI_BLOCK else tl.cdiv(C, BLOCK_C)
    program, row_programs = tl.program_id(0) // col_blocks, tl.num_programs(0) // col_blocks
    cols = tl.program_id(0) % col_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = cols < C
    seed = None if dropout.seed_ptr is None else tl.load(dropout.seed_ptr)
    weight = None if saved.weight_ptr is None else load_vector(saved.weight_ptr + cols, in_row)
    dweight = tl.zeros([BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_C], tl.float32)

    for block in tl.range(program, tl.cdiv(N, BLOCK_N), row_programs, num_stages=NUM_STAGES):
        rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
        offsets = rows.to(tl.int64)[:, None] * C + cols[None, :]
        mean = None if stats.mean_ptr is None else tl.load(stats.mean_ptr + rows, mask=rows < N, other=0.0)[:, None]
        rstd = tl.load(stats.rstd_ptr + rows, mask=rows < N, other=0.0)[:, None]
        if MULTI_BLOCK:
            backward_multi_block(saved, mean, rstd, gradients, seed, dropout, rows, cols, offsets, N, C, BLOCK_C)
        else:
            mask = (rows < N)[:, None] & in_row[None, :]
            dy, wdy, h_hat = load_backward(saved, weight, mean, rstd, offsets, mask)
            if gradients.dx_ptr is not None or gradients.dresidual_ptr is not None:
                sum_wdy = tl.sum(wdy, axis=1)[:, None]
                sum_wdy_h_hat = tl.sum(wdy * h_hat, axis=1)[:, None]
                dh = normalisation_gradient(wdy, h_hat, sum_wdy, sum_wdy_h_hat, mean, rstd, C)
                store_backward(dh, saved.dsum_ptr, gradients, seed, dropout, rows, 0, offsets, mask, BLOCK_C)
            if gradients.dweight_ptr is not None:
                dweight += tl.sum(dy * h_hat, axis=0)
            if gradients.dbias_ptr is not None:
                dbias += tl.sum(dy, axis=0)

    if gradients.dweight_ptr is not None:
        tl.store(gradients.dweight_ptr + program.to(tl.int64) * C + cols, dweight, mask=in_row)
    if gradients.dbias_ptr is not None:
        tl.store(gradients.dbias_ptr + program.to(tl.int64) * C + cols, dbias, mask=in_row)


@triton.jit(do_not_specialize=DYNAMIC_SIZES)
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


# Tiles and launches


class Tile(NamedTuple):
    """How much of (N, C) a program takes at a time, with how many warps, and how many loads of a loop in flight."""

    block_n: int
    block_c: int
    num_warps: int
    num_stages: int = 1
    num_blocks: int = 1  # side by side in registers


class Pass(NamedTuple):
    """One launch of the backward kernel, and which gradients it computes."""

    tile: Tile
    computes_dx: bool  # and dresidual
    computes_dweight: bool  # and dbias


MAX_WARP_C = 3072  # a warp cannot hold a wider row in registers alone
MAX_C = 16384  # a program cannot hold a wider row in registers: it would spill
MAX_BACKWARD_C = 8192  # the same with the gradient, weight, dweight and dbias beside the row
MAX_DROPOUT_C = 4096  # the same with the numbers that dropout draws
MULTI_BLOCK_TILE = Tile(1, 4096, 8)
MULTI_BLOCK_BACKWARD_TILE = Tile(1, 4096, 8)
DWEIGHT_TILE = Tile(4, 1024, 4, 2)  # dweight and dbias alone: columns are independent, no program holds a whole row
REDUCE_TILE = Tile(128, 32, 4)


@functools.cache
def forward_tile(C: int, itemsize: int, has_residual: bool) -> Tile:
    """One row of all warps, or several of one warp each: about four 16-byte loads of each thread in flight."""
    if C > MAX_C:
        return MULTI_BLOCK_TILE
    warp_block = 512 // itemsize  # one 16-byte load of each thread
    num_warps = 4 if C <= 4096 else 8 if C <= 8192 else 16
    block_c = min(warp_block, max(64, next_power_of_2(C))) if C <= MAX_WARP_C else warp_block * num_warps
    rows = (2048 if has_residual else 4096) // next_power_of_2(C)
    block_n = min(16, max(num_warps, rows)) if C <= MAX_WARP_C else 1
    return Tile(block_n, block_c, num_warps, num_blocks=cdiv(C, block_c))


@functools.cache
def backward_passes(C: int, itemsize: int, needs_dx: bool, needs_dweight: bool, has_dropout: bool) -> list[Pass]:
    """One pass over h and dy, or two for wide rows. Few elements per thread: each has five values or more.

    A program of one or two rows has few bytes in flight: it loads two turns of the loop ahead, where shared memory has
    room for that, which float32 of 8192 columns would fill.
    """
    block_c = max(64, next_power_of_2(C))
    num_warps = 4 if block_c <= 1024 else 8 if block_c <= 4096 else 16
    block_n = min(16, max(1, (2048 if has_dropout else 4096) // block_c))
    num_stages = 3 if block_c > 1024 and itemsize == 2 else 2
    tile = Tile(block_n, block_c, num_warps, num_stages) if C <= MAX_BACKWARD_C else MULTI_BLOCK_BACKWARD_TILE
    if (MAX_DROPOUT_C if has_dropout else MAX_BACKWARD_C) >= C:
        return [Pass(tile, needs_dx, needs_dweight)]
    return [Pass(tile, True, False)] * needs_dx + [Pass(DWEIGHT_TILE, False, True)] * needs_dweight


def backward_grid(N: int, C: int, given: Pass, num_sms: int) -> tuple[int, int]:
    """(blocks of columns, programs that share the rows of each)."""
    tile = given.tile
    col_blocks = 1 if given.computes_dx else cdiv(C, tile.block_c)
    return col_blocks, num_row_programs(cdiv(N, tile.block_n), col_blocks, tile.num_warps, num_sms)


def launch_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
    y: Tensor,
    h: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
) -> None:
    """Fills y, h, mean and rstd; every tensor is contiguous, and h is None without a residual."""
    N = rstd.numel()
    C = x.numel() // N
    tile = forward_tile(C, x.element_size(), residual is not None)
    with launch_on(x):
        launch(
            forward_kernel,
            cdiv(N, tile.block_n),
            Addition(x, residual, h),
            Affine(weight, bias),
            Dropout(seed, dropout_p, kept_factor(dropout_p)),
            y,
            Stats(mean, rstd),
            N,
            C,
            eps,
            BLOCK_N=tile.block_n,
            BLOCK_C=tile.block_c,
            NUM_BLOCKS=tile.num_blocks,
            MULTI_BLOCK=tile.num_blocks * tile.block_c < C,
            num_warps=tile.num_warps,
        )


def launch_backward(
    dy: Tensor,
    dsum: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    gradients: Sequence[Tensor | None],
) -> None:
    """Fills those of dx, dresidual, dweight and dbias that are not None; every tensor is contiguous."""
    dx, dresidual, dweight, dbias = gradients
    N = rstd.numel()
    C = h.numel() // N
    needs_dx, needs_dweight = dx is not None or dresidual is not None, dweight is not None or dbias is not None
    with launch_on(h):
        for given in backward_passes(C, h.element_size(), needs_dx, needs_dweight, seed is not None):
            tile = given.tile
            rows = (dx, dresidual) if given.computes_dx else (None, None)
            sums = (dweight, dbias) if given.computes_dweight else (None, None)
            has_dweight, has_dbias = (each is not None for each in sums)
            col_blocks, row_programs = backward_grid(N, C, given, num_sms(h.device))
            partials = rstd.new_empty(has_dweight + has_dbias, row_programs, C).unbind()
            dweight_partials = partials[0] if has_dweight else None
            dbias_partials = partials[-1] if has_dbias else None
            launch(
                backward_kernel,
                col_blocks * row_programs,
                Saved(dy, dsum, h, weight),
                Stats(mean, rstd),
                Dropout(seed, dropout_p, kept_factor(dropout_p)),
                Gradients(*rows, dweight_partials, dbias_partials),
                N,
                C,
                ALIGNED_N=N % 16 == 0,
                BLOCK_N=tile.block_n,
                BLOCK_C=tile.block_c,
                MULTI_BLOCK=given.computes_dx and tile.block_c < C,
                NUM_STAGES=tile.num_stages,
                num_warps=tile.num_warps,
            )
            if given.computes_dweight:
                sum_partials(dweight_partials, dbias_partials, *sums, row_programs, C)


def sum_partials(
    dweight_partials: Tensor | None,
    dbias_partials: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    P: int,
    C: int,
) -> None:
    """Adds up partials (P, C) over P into those of dweight and dbias that are not None."""
    launch(
        sum_partials_kernel,
        cdiv(C, REDUCE_TILE.block_c),
        dweight_partials,
        dbias_partials,
        dweight,
        dbias,
        P,
        C,
        BLOCK_P=REDUCE_TILE.block_n,
        BLOCK_C=REDUCE_TILE.block_c,
        num_warps=REDUCE_TILE.num_warps,
    )
