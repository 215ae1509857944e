"""The Triton kernels of the norms: layer norm, RMS norm, and either after a residual addition with dropout.

Names and formulas are those of norm.py. One program holds a row up to MAX_C wide (backward: MAX_BACKWARD_C) and reads
it once; it reads a wider row in blocks, twice: for its sums, and to write. The variance is summed over h - mean, never
as mean(h^2) - mean^2, which cancels for rows far from zero. In backward a fixed number of programs share the rows; each
has its own partial sums of dweight and dbias, which a second, small kernel adds up in a fixed order, so gradients are
the same on every run.

The error of a float32 sum grows with its length. So more programs share very many rows, and the sums along a row of
very many blocks are compensated.
"""

# mypy: disallow-untyped-defs=False
# (only the kernels have none: Triton gives their arguments types at each launch)

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastlm.ops._dropout import kept_factor, kernel_uniform
from fastlm.ops._triton import launch_on, num_sms, num_summing_programs, tl, triton


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
    """Fills y, h, mean and rstd, contiguous as every tensor here; there is h where there is a residual."""
    N = rstd.numel()
    C = x.numel() // N
    tile = forward_tile(C, residual is not None)
    with launch_on(x):
        forward_kernel[(triton.cdiv(N, tile.block_n),)](
            x,
            residual,
            weight,
            bias,
            seed,
            dropout_p,
            kept_factor(dropout_p),
            y,
            h,
            mean,
            rstd,
            N,
            C,
            eps,
            BLOCK_N=tile.block_n,
            BLOCK_C=tile.block_c,
            IS_WALKED=tile.block_c < C,
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
    needs_rows, needs_sums = dx is not None or dresidual is not None, dweight is not None or dbias is not None
    with launch_on(h):
        for given in backward_passes(C, needs_rows, needs_sums, seed is not None):
            tile, gives_rows, gives_sums = given
            across, down = backward_grid(N, C, given, num_sms(h.device))
            gives_dweight, gives_dbias = gives_sums and dweight is not None, gives_sums and dbias is not None
            partials = rstd.new_empty(gives_dweight + gives_dbias, down, C)
            backward_kernel[(across * down,)](
                dy,
                dsum,
                h,
                weight,
                mean,
                rstd,
                seed,
                dropout_p,
                kept_factor(dropout_p),
                dx if gives_rows else None,
                dresidual if gives_rows else None,
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
