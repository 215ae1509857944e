"""Softmax and its logarithm, scaled and masked.

    s = scale * x + mask                     or -inf where a boolean or the causal mask masks the element out
    m = max(s)      l = sum(exp(s - m))
    softmax:        y = exp(s - m) / l       ds = y * (dy - sum(dy * y))
    log_softmax:    y = s - m - log(l)       ds = dy - exp(y) * sum(dy)
    dx = scale * ds      dmask = ds, summed over the dimensions along which the mask was broadcast

The forward pass saves y, and the mask where there is one. All arithmetic is float32, long sums of a CPU float64; sums
and maxima run along a row.

A fully masked row gives 0 (log_softmax: -inf), and no gradient. A row whose inputs are all -inf is NaN, as in PyTorch.
The causal mask is aligned at the end, as in fastlm.ops.attention: query i of T_q sees the keys up to i + T_k - T_q.

A row that fits into the registers of one program, or of one warp, is read once, in blocks, so that little of a length
that is no power of 2 is padding. A longer one is read twice: online, with a running maximum and sums that are rescaled
whenever it grows, and again to write y. Causal rows are read up to the diagonal.
On a CPU csrc/softmax_cpu.cpp reads a row once: its maximum, sum and division find it in the cache.

Source: Milakov, Gimelshein 2018, Online normalizer calculation for softmax, arXiv 1805.02867.
"""

# mypy: disallow-untyped-defs=False
# (only the kernels have none: Triton gives their arguments types at each launch)

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy

from fastlm.ops import _torch
from fastlm.ops._dispatch import TORCH, is_one_of, route, use_cpp
from fastlm.ops._fx import recorded
from fastlm.ops._kernel_math import LOG2E, exp_nonpositive
from fastlm.ops._launch import launch, launch_on
from fastlm.ops._register import apply, is_double_backward, register
from fastlm.ops._triton import DYNAMIC_SIZES, cdiv, next_power_of_2, tl, triton


def softmax_reference(
    input: Tensor,
    dim: int = -1,
    dtype: torch.dtype | None = None,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: bool = False,
    log: bool = False,
) -> Tensor:
    """The formula in plain PyTorch, in float32 or wider."""
    x = input if dtype is None else input.to(dtype)
    s = x.to(torch.promote_types(x.dtype, torch.float32)) * scale
    if mask is None and not causal:
        return (s.log_softmax(dim) if log else s.softmax(dim)).to(x.dtype)
    masked = torch.zeros((), dtype=torch.bool, device=s.device)
    if causal:
        masked = ~torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril(s.shape[-1] - s.shape[-2])
    masked_out = masked  # also by -inf of an additive mask, which needs no masked_fill
    if mask is not None and mask.dtype == torch.bool:
        masked_out = masked = masked | ~mask
    elif mask is not None:
        s = s + mask
        masked_out = masked | mask.isneginf()
    fully_masked = masked_out.expand_as(s).all(dim, keepdim=True)
    s = s.masked_fill(masked, -math.inf).masked_fill(fully_masked, 0.0)  # a row of -inf would have a gradient of NaN
    y = s.log_softmax(dim) if log else s.softmax(dim)
    return y.masked_fill(fully_masked, -math.inf if log else 0.0).to(x.dtype)


class Mask(NamedTuple):
    """A mask read as if it had the input's shape, with up to MASK_DIMS leading dimensions; ptr is None for no mask.

    Kernels take the fields one by one: see DYNAMIC_SIZES.
    """

    ptr: Any  # uint8 for a boolean mask, floating-point for an additive one
    strides: Any  # of the three inner dimensions, of the outermost one and of the columns; 0 along a broadcast one
    size_0: Any  # of the inner dimensions, the innermost first; None for one that the mask does not have
    size_1: Any
    size_2: Any


@triton.jit
def visible_elements(rows, cols, N, C, T, GROUP: tl.constexpr, IN_ROW: tl.constexpr = False):
    """The elements of a tile that exist and that the causal mask keeps, rounded up to groups of columns.

    Loads take groups of 16: if the ragged edge itself were their mask, none could be wider than an element.
    IN_ROW says that no column is beyond the row, which spares comparing them.
    """
    visible = (rows < N)[:, None] & (True if IN_ROW else (cols < C)[None, :])
    if T is not None:
        visible &= (cols // GROUP)[None, :] <= ((rows % T + C - T) // GROUP)[:, None]
        visible &= (rows % T + C >= T)[:, None]  # a query that sees no key: division rounds its negative end to 0
    return visible


@triton.jit
def mask_ptrs(mask, rows, cols):
    """Pointers to the mask's elements for a tile; the row number counts through the leading dimensions."""
    offsets = tl.zeros(rows.shape, tl.int64)
    sizes = (mask.size_0, mask.size_1, mask.size_2)
    for DIM in tl.static_range(3):
        if sizes[DIM] is not None:
            offsets += (rows % sizes[DIM]).to(tl.int64) * mask.strides[DIM]
            rows = rows // sizes[DIM]
    offsets += rows.to(tl.int64) * mask.strides[3]
    return mask.ptr + (offsets[:, None] + (cols.to(tl.int64) * mask.strides[4])[None, :])


@triton.jit
def finite_max(m):
    """m, or the lowest float32 where m is -inf or NaN: -inf - -inf would be NaN, and exp of it must be 0."""
    return tl.where(m > -3.4028234663852886e38, m, -3.4028234663852886e38)


@triton.jit
def load_scores(x_ptr, mask, rows, cols, N, C, T, scale, dtype: tl.constexpr, IN_ROW: tl.constexpr = False):
    """(s of a tile, the same with every element finite but those that are masked out).

    The maximum of the second is -inf for a fully masked row, and not for a row whose inputs are all -inf.
    """
    ADDITIVE: tl.constexpr = mask.ptr is not None and mask.ptr.dtype.element_ty != tl.uint8
    loaded = visible_elements(rows, cols, N, C, T, 16, IN_ROW)
    kept = visible_elements(rows, cols, N, C, T, 1, IN_ROW)
    x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * C + cols[None, :], mask=loaded, other=0.0)
    s = x.to(dtype).to(tl.float32) * scale
    if ADDITIVE:
        added = tl.load(mask_ptrs(mask, rows, cols), mask=loaded, other=0.0).to(tl.float32)
        s += added
    elif mask.ptr is not None:
        kept &= tl.load(mask_ptrs(mask, rows, cols), mask=loaded, other=0) != 0
    if not IN_ROW or T is not None or mask.ptr is not None:
        s = tl.where(kept, s, float("-inf"))
    if ADDITIVE:
        kept &= added != float("-inf")
    if mask.ptr is not None or T is not None:
        return s, tl.where(kept, finite_max(s), float("-inf"))
    return s, s


@triton.jit
def log2e_for(m):
    """log2(e), or 1 for a row of huge maximum m, where m log2(e) is rounded by a large exponent, or infinite.

    The next smaller float32 is 64 less there: its exponential is nothing beside 1 by either factor.
    """
    return tl.where(tl.abs(m) < 1073741824.0, LOG2E, 1.0)  # 2^30


@triton.jit
def exponentials(s, m, FOLDED: tl.constexpr):
    """exp(s - m) of a tile, m the maxima of its rows.

    Folded it is 2^(s log2(e) - m log2(e)): an FMA and ex2 an element. The rounding of m log2(e) is the same for a whole
    row, and goes when that is divided by its sum: not so in log_softmax. It leaves the maximum no exact 1, which shows
    in float32.
    """
    m = finite_max(m)[:, None]
    if not FOLDED:
        return tl.exp2((s - m) * LOG2E)
    factor = log2e_for(m)
    return tl.exp2(tl.fma(s, tl.broadcast_to(factor, s.shape), tl.broadcast_to(-m * factor, s.shape)))


@triton.jit
def rescaled(m, larger, FOLDED: tl.constexpr):
    """What takes sums of exponentials(s, m) to sums of exponentials(s, larger), with the roundings of either."""
    m, larger = finite_max(m), finite_max(larger)
    if not FOLDED:
        return tl.exp2((m - larger) * LOG2E)
    return tl.exp2(m * log2e_for(m) - larger * log2e_for(larger))


@triton.jit
def normalised(s, m, sum_exp, LOG: tl.constexpr, MASKED: tl.constexpr, dtype: tl.constexpr):
    """The outputs of a tile, from the maxima and sums of its rows; by a reciprocal a row, not a quotient an element."""
    if LOG:
        y = s - finite_max(m)[:, None] - tl.log(sum_exp)[:, None]
    else:
        y = exponentials(s, m, dtype != tl.float32)
        reciprocal = 1.0 / sum_exp
        if dtype == tl.float32:  # 16 bits hide what the reciprocal is off
            off = tl.fma(-sum_exp, reciprocal, 1.0) * reciprocal
            y = tl.fma(y, tl.broadcast_to(reciprocal[:, None], y.shape), y * off[:, None])
        else:
            y *= reciprocal[:, None]
    if MASKED:
        y = tl.where((m == float("-inf"))[:, None], float("-inf") if LOG else 0.0, y)
    return y


@triton.jit(do_not_specialize=DYNAMIC_SIZES)
def forward_kernel(
    x_ptr,  # (N, C)
    mask_ptr,
    mask_strides,
    mask_size_0,
    mask_size_1,
    mask_size_2,
    y_ptr,  # (N, C)
    N,
    C,
    T,  # rows of a causal matrix, or None without the causal mask
    scale,
    LOG: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,  # of a row in registers; 0 where it is read twice, and BLOCK_N is 1
    NUM_STAGES: tl.constexpr,
):
    mask = Mask(mask_ptr, mask_strides, mask_size_0, mask_size_1, mask_size_2)
    MASKED: tl.constexpr = mask_ptr is not None or T is not None
    dtype: tl.constexpr = y_ptr.dtype.element_ty  # the input is cast first, as torch's dtype argument says
    FOLDED: tl.constexpr = not LOG and dtype != tl.float32
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_C)
    starts = rows.to(tl.int64)[:, None] * C

    if NUM_BLOCKS == 0:
        end = C
        if T is not None:
            end = tl.minimum(C, tl.program_id(0) % T + C - T + 1)
        m = tl.full([BLOCK_N], float("-inf"), tl.float32)
        partial = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)  # elementwise: threads add up their sums once, at the end
        for start in tl.range(0, end, BLOCK_C, num_stages=NUM_STAGES):
            s, unmasked = load_scores(x_ptr, mask, rows, start + cols, N, C, T, scale, dtype)
            larger = tl.maximum(m, tl.max(unmasked, axis=1))
            partial = partial * rescaled(m, larger, FOLDED)[:, None] + exponentials(s, larger, FOLDED)
            m = larger
        sum_exp = tl.sum(partial, axis=1)
        for start in tl.range(0, C, BLOCK_C, num_stages=NUM_STAGES):
            s, _ = load_scores(x_ptr, mask, rows, start + cols, N, C, T, scale, dtype)
            y = normalised(s, m, sum_exp, LOG, MASKED, dtype)
            inside = (rows < N)[:, None] & (start + cols < C)[None, :]
            tl.store(y_ptr + starts + start + cols[None, :], y.to(dtype), mask=inside)
    else:
        blocks = ()
        largest = tl.full([BLOCK_N, BLOCK_C], float("-inf"), tl.float32)
        for block in tl.static_range(NUM_BLOCKS):
            own_cols = block * BLOCK_C + cols
            s, unmasked = load_scores(x_ptr, mask, rows, own_cols, N, C, T, scale, dtype, block + 1 < NUM_BLOCKS)
            blocks = blocks + (s,)  # type: ignore[assignment]  # noqa: RUF005 Triton knows no starred expression
            largest = tl.maximum(largest, unmasked)
        m = tl.max(largest, axis=1)
        partial = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for block in tl.static_range(NUM_BLOCKS):
            partial += exponentials(blocks[block], m, FOLDED)
        sum_exp = tl.sum(partial, axis=1)
        for block in tl.static_range(NUM_BLOCKS):
            own_cols = block * BLOCK_C + cols
            y = normalised(blocks[block], m, sum_exp, LOG, MASKED, dtype)
            inside = visible_elements(rows, own_cols, N, C, None, 1, block + 1 < NUM_BLOCKS)
            tl.store(y_ptr + starts + own_cols[None, :], y.to(dtype), mask=inside)


@triton.jit
def load_gradients(dy_ptr, y_ptr, rows, cols, N, C, T, LOG: tl.constexpr, MASKED: tl.constexpr):
    """(dy, y) of a tile. What the causal mask masks out needs no load, but for log_softmax's sum of dy."""
    loaded = visible_elements(rows, cols, N, C, T, 16)
    offsets = rows.to(tl.int64)[:, None] * C + cols[None, :]
    y = tl.load(y_ptr + offsets, mask=loaded, other=float("-inf") if LOG else 0.0).to(tl.float32)
    if LOG:
        loaded = (rows < N)[:, None] & (cols < C)[None, :]
    dy = tl.load(dy_ptr + offsets, mask=loaded, other=0.0).to(tl.float32)
    if MASKED and not LOG:
        dy = tl.where(y == 0.0, 0.0, dy)  # else an infinite dy of a masked element would make its row NaN
    return dy, y


@triton.jit
def store_gradients(
    dy,
    y,
    total,  # sum over the row of dy, or of dy * y
    row_has_keys,  # 0 for a fully masked row; only used for log_softmax with an additive mask
    mask,
    dx_ptr,
    dmask_ptr,
    rows,
    cols,
    N,
    C,
    T,
    scale,
    LOG: tl.constexpr,
    dtype: tl.constexpr,  # of y in memory
):
    BOOLEAN: tl.constexpr = mask.ptr is not None and mask.ptr.dtype.element_ty == tl.uint8
    if LOG:
        ds = dy - exp_nonpositive(y, dtype) * total[:, None]
        # A masked element's exp(-inf) = 0 would leave its dy, though it depends on no input. Softmax's y = 0 does not.
        if T is not None or BOOLEAN:
            kept = visible_elements(rows, cols, N, C, T, 1)
            if BOOLEAN:
                kept &= tl.load(mask_ptrs(mask, rows, cols), mask=kept, other=0) != 0
            ds = tl.where(kept, ds, 0.0)
        if mask.ptr is not None and not BOOLEAN:
            ds = tl.where(row_has_keys[:, None] != 0.0, ds, 0.0)
    else:
        ds = y * (dy - total[:, None])
    inside = (rows < N)[:, None] & (cols < C)[None, :]
    offsets = rows.to(tl.int64)[:, None] * C + cols[None, :]
    if dx_ptr is not None:
        tl.store(dx_ptr + offsets, (ds * scale).to(dx_ptr.dtype.element_ty), mask=inside)
    if dmask_ptr is not None:
        tl.store(dmask_ptr + offsets, ds.to(dmask_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=DYNAMIC_SIZES)
def backward_kernel(
    dy_ptr,  # (N, C)
    y_ptr,  # (N, C)
    mask_ptr,
    mask_strides,
    mask_size_0,
    mask_size_1,
    mask_size_2,
    dx_ptr,  # (N, C), or None if it is not needed
    dmask_ptr,  # (N, C), not yet summed over broadcast dimensions, or None
    N,
    C,
    T,  # rows of a causal matrix, or None without the causal mask
    scale,
    LOG: tl.constexpr,
    MULTI_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    mask = Mask(mask_ptr, mask_strides, mask_size_0, mask_size_1, mask_size_2)
    MASKED: tl.constexpr = mask_ptr is not None or T is not None
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    USES_ROW_HAS_KEYS: tl.constexpr = LOG and mask_ptr is not None and mask_ptr.dtype.element_ty != tl.uint8
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_C)

    if MULTI_BLOCK:
        total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        row_has_keys = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for start in tl.range(0, C, BLOCK_C, num_stages=NUM_STAGES):
            dy, y = load_gradients(dy_ptr, y_ptr, rows, start + cols, N, C, T, LOG, MASKED)
            total += dy if LOG else dy * y
            if USES_ROW_HAS_KEYS:
                row_has_keys = tl.where(y == float("-inf"), row_has_keys, 1.0)
        total, row_has_keys = tl.sum(total, axis=1), tl.max(row_has_keys, axis=1)
        for start in tl.range(0, C, BLOCK_C, num_stages=NUM_STAGES):
            dy, y = load_gradients(dy_ptr, y_ptr, rows, start + cols, N, C, T, LOG, MASKED)
            store_gradients(
                dy, y, total, row_has_keys, mask, dx_ptr, dmask_ptr, rows, start + cols, N, C, T, scale, LOG, dtype
            )
    else:
        dy, y = load_gradients(dy_ptr, y_ptr, rows, cols, N, C, T, LOG, MASKED)
        total = tl.sum(dy if LOG else dy * y, axis=1)
        row_has_keys = tl.max(tl.where(y == float("-inf"), 0.0, 1.0), axis=1) if USES_ROW_HAS_KEYS else None
        store_gradients(dy, y, total, row_has_keys, mask, dx_ptr, dmask_ptr, rows, cols, N, C, T, scale, LOG, dtype)


class Tile(NamedTuple):
    """How much of (N, C) one program takes at a time, with how many warps, and how many loads of a loop in flight."""

    block_n: int
    block_c: int
    num_warps: int
    num_stages: int = 1
    num_blocks: int = 1  # of a row side by side in registers; 0 where it is read twice


# The longest rows that fit into the registers of a warp or of a program: longer ones would spill.
MAX_WARP_C = 3072
MAX_MASKED_WARP_C = 1024  # a mask takes registers too
MAX_C = 16384
MAX_PLAIN_C = {2: 53248, 4: 36864}  # of forward without a mask, by the larger of the element sizes of x and y
MULTI_BLOCK_TILE = Tile(1, 4096, 8, 2, 0)  # for longer rows; no larger, because the last block is on average half empty
MASK_DIMS = 4  # leading dimensions of a mask in the kernels; neighbours that one stride can step through count as one


def forward_tile(C: int, itemsize: int, y_itemsize: int, masked: bool) -> Tile:
    """One row of all warps, or several of one warp each, which wait for no other; four 16-byte loads a thread or so."""
    is_plain = not masked and C % 16 == 0  # else the address of each element takes registers
    if (MAX_PLAIN_C[max(itemsize, y_itemsize)] if is_plain else MAX_C) < C:
        return MULTI_BLOCK_TILE
    warp_block = 512 // itemsize  # one 16-byte load of each thread
    num_warps = 4 if C <= 4096 else 8 if C <= 8192 else 16
    if (MAX_MASKED_WARP_C if masked else MAX_WARP_C) < C:
        block_n, block_c = 1, warp_block * num_warps
    else:
        block_n, block_c = min(16, max(num_warps, 4096 // next_power_of_2(C))), min(warp_block, next_power_of_2(C))
    block_c = max(64, block_c)
    return Tile(block_n, block_c, num_warps, num_blocks=cdiv(C, block_c))


def backward_tile(C: int) -> Tile:
    """One row, or enough short ones to make 4096 elements: 16 to 32 per thread are several 16-byte loads."""
    if C > MAX_C:
        return MULTI_BLOCK_TILE
    block_c = max(64, next_power_of_2(C))
    return Tile(min(16, max(1, 4096 // block_c)), block_c, 4 if block_c <= 2048 else 8 if block_c <= 8192 else 16)


def expanded(mask: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    return None if mask is None else mask.expand(shape)


def broadcast_mask(mask: Tensor | None, shape: Sequence[int]) -> Mask:
    """The kernels' view of a mask that broadcasts to shape; only one with too many dimensions is copied."""
    if mask is None:
        return Mask(None, None, None, None, None)
    expanded = mask.expand(shape)
    leading: list[tuple[int, int]] = []
    for size, stride in zip(shape[:-1], expanded.stride()[:-1], strict=True):
        if size == 1:
            continue
        if leading and leading[-1][1] == size * stride:
            leading[-1] = (leading[-1][0] * size, stride)
        else:
            leading.append((size, stride))
    if len(leading) > MASK_DIMS:
        return broadcast_mask(expanded.contiguous(), shape)
    (_, outermost_stride), *inner = leading or [(1, 0)]
    absent = MASK_DIMS - 1 - len(inner)
    sizes, strides = zip(*inner[::-1], *[(None, 0)] * absent, strict=True)
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    return Mask(mask, (*strides, outermost_stride, expanded.stride(-1)), *sizes)


def forward(input: Tensor, mask: Tensor | None, scale: float, causal: bool, log: bool, dtype: torch.dtype) -> Tensor:
    """Output of that dtype for an input (..., C) and a mask that broadcasts to it."""
    y = forward_output(input, mask, scale, causal, log, dtype)
    if y.numel() == 0:
        return y
    if use_cpp(input):
        x = input.to(dtype) if dtype != torch.float32 else input  # the cast comes first, and widening is exact
        torch.ops.fastlm.softmax_rows(x.contiguous(), expanded(mask, input.shape), scale, causal, log, y)
        return y
    C = input.shape[-1]
    N = input.numel() // C
    tile = forward_tile(C, input.element_size(), y.element_size(), mask is not None or causal)
    with launch_on(input):
        launch(
            forward_kernel,
            cdiv(N, tile.block_n),
            input.contiguous(),
            *broadcast_mask(mask, input.shape),
            y,
            N,
            C,
            input.shape[-2] if causal else None,
            scale,
            LOG=log,
            BLOCK_N=tile.block_n,
            BLOCK_C=tile.block_c,
            NUM_BLOCKS=tile.num_blocks,
            NUM_STAGES=tile.num_stages,
            num_warps=tile.num_warps,
        )
    return y


def forward_output(
    input: Tensor, mask: Tensor | None, scale: float, causal: bool, log: bool, dtype: torch.dtype
) -> Tensor:
    """What forward returns, before a kernel fills it: this alone is what a traced program needs to know."""
    return input.new_empty(input.shape, dtype=dtype)


def backward(
    dy: Tensor,
    y: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    log: bool,
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """(dx of that dtype, dmask); what `needs` does not ask for is empty and costs nothing."""
    dx, dmask = backward_outputs(dy, y, mask, scale, causal, log, dtype, needs)
    if y.numel() == 0:
        return dx, dmask.zero_()
    C = y.shape[-1]
    N = y.numel() // C
    broadcast = needs[1] and dmask.shape != y.shape
    summands = torch.empty(y.shape, dtype=torch.float32, device=y.device) if broadcast else dmask
    if use_cpp(y):
        wanted = dx if needs[0] else None, summands if needs[1] else None
        torch.ops.fastlm.softmax_backward_rows(
            dy.contiguous(), y.contiguous(), expanded(mask, y.shape), scale, causal, log, *wanted
        )
        return dx, dmask.copy_(summands.sum_to_size(dmask.shape)) if broadcast else dmask
    tile = backward_tile(C)
    with launch_on(y):
        launch(
            backward_kernel,
            cdiv(N, tile.block_n),
            dy.contiguous(),
            y.contiguous(),
            *broadcast_mask(mask, y.shape),
            dx if needs[0] else None,
            summands if needs[1] else None,
            N,
            C,
            y.shape[-2] if causal else None,
            scale,
            LOG=log,
            MULTI_BLOCK=tile == MULTI_BLOCK_TILE,
            BLOCK_N=tile.block_n,
            BLOCK_C=tile.block_c,
            NUM_STAGES=tile.num_stages,
            num_warps=tile.num_warps,
        )
    return dx, dmask.copy_(summands.sum_to_size(dmask.shape)) if broadcast else dmask


def backward_outputs(
    dy: Tensor,
    y: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    log: bool,
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """What backward returns, before a kernel fills it."""
    dx = y.new_empty(y.shape if needs[0] else 0, dtype=dtype)
    if mask is None or not needs[1]:
        return dx, dx.new_empty(0)
    return dx, mask.new_empty(mask.shape)


forward_op = register(
    "softmax(Tensor input, Tensor? mask, float scale, bool causal, bool log, ScalarType dtype) -> Tensor",
    forward,
    forward_output,
)
backward_op = register(
    "softmax_backward(Tensor dy, Tensor y, Tensor? mask, float scale, bool causal, bool log, ScalarType dtype,"
    " bool[2] needs) -> (Tensor, Tensor)",
    backward,
    backward_outputs,
)


class SoftmaxFunction(torch.autograd.Function):
    """Joins the two raw ops into one differentiable function."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, mask: Tensor | None, scale: float, causal: bool, log: bool, dtype: torch.dtype
    ) -> Tensor:
        y = forward_op(input, mask, scale, causal, log, dtype)
        ctx.save_for_backward(y, mask)
        ctx.options = scale, causal, log, input.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        y, mask = ctx.saved_tensors
        scale, causal, log, dtype = ctx.options
        needs = ctx.needs_input_grad[:2]
        if is_double_backward():
            dx, dmask = gradients_in_pytorch(dy, y, mask, scale, causal, log, dtype, needs)
        else:
            dx, dmask = backward_op(dy, y, mask, scale, causal, log, dtype, needs)
        return dx if needs[0] else None, dmask if needs[1] else None, None, None, None, None


def gradients_in_pytorch(
    dy: Tensor,
    y: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    log: bool,
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor | None]:
    """(dx, dmask) in plain PyTorch, as functions of dy and y that autograd can differentiate again."""
    dy, y = dy.float(), y.float()
    if not log:
        ds = y * (dy - (dy * y).sum(-1, keepdim=True))
        if mask is not None or causal:
            ds = ds.masked_fill(y == 0, 0.0)
    else:
        ds = dy - y.exp() * dy.sum(-1, keepdim=True)
        if causal:
            ds = ds.tril(y.shape[-1] - y.shape[-2])
        if mask is not None and mask.dtype == torch.bool:
            ds = ds.masked_fill(~mask, 0.0)
        elif mask is not None:
            ds = ds.masked_fill(y.isneginf().all(-1, keepdim=True), 0.0)
    dmask = ds.sum_to_size(mask.shape).to(mask.dtype) if needs[1] and mask is not None else None
    return (ds * scale).to(dtype), dmask


def compute(
    function: Callable[..., Tensor],
    input: Tensor,
    dim: int | None,
    stacklevel: int,
    dtype: torch.dtype | None,
    scale: float,
    mask: Tensor | None,
    causal: bool,
) -> Tensor:
    """Runs a kernel if one supports the call, else PyTorch's function, Tensor.softmax or Tensor.log_softmax."""
    name = function.__name__
    plain = scale == 1.0 and mask is None and not causal
    if not plain:
        check_arguments(name, input, dtype, mask, causal)
    if dim is None:
        dim = implicit_dim(name, input.dim(), stacklevel + 1)
    found = route(name if plain else "softmax with options", (input,), (mask, dim, dtype))
    if plain and found.implementation == TORCH:
        return (
            function(input, dim) if dtype is None else function(input, dim, dtype=dtype)
        )  # a dim given by name takes no dtype=None
    if dtype is None:  # autocast runs both in float32 on CUDA
        dtype = torch.float32 if input.is_cuda and torch.is_autocast_enabled("cuda") else input.dtype
    if found.implementation != TORCH:
        return apply(SoftmaxFunction, input.contiguous(), mask, scale, causal, name == "log_softmax", dtype)
    return softmax_reference(input, dim, dtype, scale=scale, mask=mask, causal=causal, log=name == "log_softmax")


@_torch.assume_constant_result  # torch.compile cannot trace the warning
def implicit_dim(name: str, ndim: int, stacklevel: int) -> int:
    """PyTorch's old choice of dim where none is given, and its warning."""
    return F._get_softmax_dim(name, ndim, stacklevel)  # type: ignore[attr-defined]


def check_arguments(name: str, input: Tensor, dtype: torch.dtype | None, mask: Tensor | None, causal: bool) -> None:
    if not (dtype or input.dtype).is_floating_point:
        raise TypeError(f"{name}: input is {input.dtype}, expected a floating-point tensor; give dtype to cast it")
    if causal and input.dim() < 2:
        raise ValueError(
            f"{name}: causal with input of shape {tuple(input.shape)}, expected two dimensions or more: (..., T_q, T_k)"
        )
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name}: mask is {mask.dtype}, expected torch.bool (True keeps) or floating-point (added)")
    if mask.device != input.device:
        raise ValueError(f"{name}: mask is on {mask.device}, expected {input.device}, where input is; move it there")
    sizes = zip(mask.shape[::-1], input.shape[::-1], strict=False)
    if mask.dim() > input.dim() or any(not is_one_of(size, 1, of_input) for size, of_input in sizes):
        raise ValueError(
            f"{name}: mask has shape {tuple(mask.shape)}, expected one that broadcasts to that of input, "
            f"{tuple(input.shape)}"
        )


def softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Exponentials of scale * input + mask along dim, divided by their sum.

        y = exp(s) / sum(exp(s))        s = scale * input + mask

    input    any shape; float32, float16 or bfloat16 along the last dimension for the kernels, others run PyTorch's code
    dtype    input is cast to it first
    mask     broadcasts to input's shape; bool, where True keeps an element, or floating-point, added after the scale
    causal   masks keys after i + T_k - T_q for query i of input (..., T_q, T_k): aligned at the end, as in attention
    returns  shape of input, dtype or that of input (float32 under CUDA autocast); float32 inside

    A fully masked row is 0 and has no gradient; a row whose inputs are all -inf is NaN, as in PyTorch. An additive
    mask may have a gradient, summed over its broadcast dimensions.
    Equals torch.nn.functional.softmax where the keyword-only arguments are left out. With them, raises ValueError for
    a mask's shape or device or a causal input of less than two dimensions, TypeError for a dtype.
    Source: Milakov, Gimelshein 2018, arXiv 1805.02867.
    """
    if isinstance(input, Proxy) or isinstance(mask, Proxy):
        return recorded(softmax, locals())
    return compute(Tensor.softmax, input, dim, _stacklevel + 1, dtype, scale, mask, causal)


def log_softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Logarithm of softmax, more exact for small probabilities than the logarithm of its result.

        y = s - log(sum(exp(s)))        s = scale * input + mask

    Arguments, dtypes and errors are those of softmax. A masked element gives -inf; a fully masked row gives -inf and
    has no gradient. Equals torch.nn.functional.log_softmax where the keyword-only arguments are left out.
    """
    if isinstance(input, Proxy) or isinstance(mask, Proxy):
        return recorded(log_softmax, locals())
    return compute(Tensor.log_softmax, input, dim, _stacklevel + 1, dtype, scale, mask, causal)
