"""The Triton kernels of fastlm/ops/attention.py, forward and backward, for dense tensors and varlen sequences alike.

Scores are exponents of 2: a score is scale_log2 * r, where r is the product q . k and scale_log2 = scale * log2(e). So
the scale costs no multiplication beyond the one that exp2 needs anyway. With a softcap r is the tanh, and scale_log2 is
softcap * log2(e). float32 scores are multiplied by their scale at once and go through exp; scale_log2 is 1 there.

forward   one program per block of queries and head loops over the visible keys with a running maximum and sum
delta     delta_i = o_i . do_i - dlse_i, which is subtracted from every dp of row i, so dlse costs nothing further on;
          and shift_i, which is subtracted from every exponent of row i: lse_i, in the units of exp2 where that is used.
          With dropout o_i is out plus the part that rounding took from it: without it not even the ds of a row that
          sees a single key would be 0
dq        one program per block of queries and head loops over the visible keys, as in forward
dkdv      one program per block of keys and key head loops over the queries that see them, of all heads of the group
Backward computes the products q . k and do . v twice. In return it sums in a fixed order, without atomics.

The loop over the other sequence has three parts: blocks at the left edge of what is visible, blocks that every row sees
in full, blocks at the right edge. Only the edges compute a mask. Blocks that no row sees are never loaded.

Varlen: a small kernel lists which block of which sequence each program takes, those with the most work first. It reads
cu_seqlens on the device; the host knows only the most entries there can be. The tokens after the last sequence count as
one more sequence, which sees nothing, so these kernels write every element of every result.

On sm_90 and newer the inner loops load their blocks by TMA, through tensor descriptors.
"""

# mypy: disallow-untyped-defs=False
# (only the kernels have none: Triton gives their arguments types at each launch)

from typing import Any, NamedTuple

from fastlm.ops._dropout import kernel_is_kept
from fastlm.ops._kernel_math import LOG2E, quotient
from fastlm.ops._triton import DYNAMIC_SIZES, multiple_of_16, tl, triton

LEFT_EDGE, IN_FULL, RIGHT_EDGE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # regions of a loop's blocks
LN2 = tl.constexpr(0.6931471805599453)
REMAINDER_SCALE = tl.constexpr(256.0)  # below 1 / eps of both 16-bit types; keeps small remainders of float16 normal


# What the kernels take, in groups, beside Heads and Dropout


class Scoring(NamedTuple):
    """How a product becomes a score, and which keys a query sees."""

    scale_log2: Any  # (scale or softcap) * log2(e), which exp2 multiplies scores by; 1 where exp is used
    scale_exp: Any  # scale or softcap, which scores are multiplied by before exp; None where exp2 is used
    scale_tanh: Any  # scale / softcap, or None without a softcap
    window_left: Any  # how many keys before its position a query sees, or None for all
    window_right: Any
    slopes_ptr: Any  # of ALiBi, or None
    stride_slopes: Any  # from one batch row or sequence to the next
    sinks_ptr: Any  # (H,), or None


class Varlen(NamedTuple):
    """Where sequences begin, and which of their blocks each program takes; all None if the tensors are dense."""

    cu_seqlens_q_ptr: Any
    cu_seqlens_k_ptr: Any
    tiles_ptr: Any  # (scheduler.num_blocks, 2): sequence and block, or -1 for no work


class TileScheduler(NamedTuple):
    """Which programs there are: num_blocks for each batch-head pair; varlen, for each head, of all sequences.

    Kernels take the fields one by one: see DYNAMIC_SIZES.
    """

    num_blocks: Any
    num_bh: Any
    swizzle_group: Any  # batch-head pairs scheduled together, so that what they read stays in the L2 cache
    num_heads: Any
    num_seqs: Any  # or batch rows
    T_q: Any  # tokens in a batch row, or in all sequences
    T_k: Any


class Config(NamedTuple):
    """What a kernel is compiled for, all constexpr."""

    D: Any
    BLOCK_M: Any
    BLOCK_N: Any
    BLOCK_D: Any
    GROUP_SIZE: Any  # query heads that share a key head
    VARLEN: Any
    USE_TMA: Any  # in the inner loop, whose operands are then descriptors of (B, H, T, D)


class Span(NamedTuple):
    """The rows of one sequence in a tensor of Heads."""

    batch: Any
    start: Any
    length: Any


class WorkTile(NamedTuple):
    """What a program works on: a block of queries or keys of one head of one sequence, or of one batch row."""

    seq_idx: Any
    head: Any
    block: Any
    q: Any  # the sequence's Span in q, out and their gradients
    k: Any  # the same in k, v and their gradients


# Where a program works


@triton.jit
def seq_bounds(cu_seqlens_ptr, seq_idx, num_seqs, total):
    """(first token, number of tokens), never outside the total. Sequence num_seqs is what follows the last."""
    start = tl.load(cu_seqlens_ptr + seq_idx, mask=seq_idx <= num_seqs, other=total)
    end = tl.load(cu_seqlens_ptr + seq_idx + 1, mask=seq_idx < num_seqs, other=total)
    start = tl.minimum(tl.maximum(start, 0), total).to(tl.int32)
    return start, tl.maximum(tl.minimum(end, total).to(tl.int32) - start, 0)


@triton.jit
def get_work_tile(scheduler, varlen, OVER_KEYS: tl.constexpr):
    """The tile of this program; seq_idx is -1 if it has none."""
    first_bh = tl.program_id(0) // (scheduler.num_blocks * scheduler.swizzle_group) * scheduler.swizzle_group
    idx_in_group = tl.program_id(0) % (scheduler.num_blocks * scheduler.swizzle_group)
    num_bh = tl.minimum(scheduler.swizzle_group, scheduler.num_bh - first_bh)
    bh, tile_idx = first_bh + idx_in_group % num_bh, idx_in_group // num_bh
    if varlen.tiles_ptr is None:
        # Causal work is heaviest at the end for queries, at the start for keys.
        block = tile_idx if OVER_KEYS else scheduler.num_blocks - 1 - tile_idx
        seq_idx = bh // scheduler.num_heads
        q, k = Span(seq_idx, 0, scheduler.T_q), Span(seq_idx, 0, scheduler.T_k)
        return WorkTile(seq_idx, bh % scheduler.num_heads, block, q, k)
    else:
        seq_idx = tl.load(varlen.tiles_ptr + 2 * tile_idx)
        block = tl.load(varlen.tiles_ptr + 2 * tile_idx + 1)
        loadable, n = tl.maximum(seq_idx, 0), scheduler.num_seqs
        q_start, q_length = seq_bounds(varlen.cu_seqlens_q_ptr, loadable, n, scheduler.T_q)
        k_start, k_length = seq_bounds(varlen.cu_seqlens_k_ptr, loadable, n, scheduler.T_k)
        if OVER_KEYS:
            q_length = tl.where(seq_idx == n, 0, q_length)
        else:
            k_length = tl.where(seq_idx == n, 0, k_length)
        return WorkTile(seq_idx, bh, block, Span(0, q_start, q_length), Span(0, k_start, k_length))


@triton.jit
def block_ranges(first, last, window_left, window_right, length, BLOCK: tl.constexpr):
    """(start, full_start, full_end, end) of the blocks that the rows first..last see in a sequence of this length.

    Some row sees each block from start to end; every row sees each block from full_start to full_end in full.
    """
    start, full_start = 0, 0
    end, full_end = length, length
    if window_left is not None:
        start = tl.maximum(first - window_left, 0) // BLOCK * BLOCK
        full_start = tl.maximum(last - window_left, 0)
    if window_right is not None:
        end = tl.minimum(last + window_right + 1, length)
        full_end = tl.minimum(first + window_right + 1, length)
    end = tl.maximum(end, start)
    full_start = tl.minimum(tl.maximum(tl.cdiv(full_start, BLOCK) * BLOCK, start), end)
    full_end = tl.maximum(tl.maximum(full_end, 0) // BLOCK * BLOCK, full_start)
    return start, full_start, full_end, end


@triton.jit
def load_block(x, span, head, first, config: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """(BLOCK, BLOCK_D): the rows of a span from `first` on; if MASKED, 0 behind its end. Features from D on are 0."""
    rows, cols = first + tl.arange(0, BLOCK), tl.arange(0, config.BLOCK_D)
    token = tl.cast(span.start + first, tl.int64)
    origin = x.ptr + tl.cast(span.batch, tl.int64) * x.stride_batch + head.to(tl.int64) * x.stride_head
    first_ptr = origin + token * x.stride_token
    ptrs = first_ptr + (tl.arange(0, BLOCK).to(tl.int64)[:, None] * x.stride_token + cols[None, :])
    if MASKED:
        return tl.load(ptrs, mask=(rows < span.length)[:, None] & (cols < config.D)[None, :], other=0.0)
    elif config.D < config.BLOCK_D:
        return tl.load(ptrs, mask=(cols < config.D)[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def load_streamed(x, span, head, first, config: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """load_block for the operands of an inner loop, by TMA where the kernel uses it."""
    if config.USE_TMA:
        block = x.load([span.batch, head, span.start + first, 0]).reshape(BLOCK, config.BLOCK_D)
        if config.VARLEN and MASKED:  # the next sequence's values may be anything, and 0 * NaN is NaN
            rows = first + tl.arange(0, BLOCK)
            block = tl.where((rows < span.length)[:, None], block, 0.0)
        return block
    else:
        return load_block(x, span, head, first, config, BLOCK, MASKED)


@triton.jit
def store_block(x, values, span, head, first, config: tl.constexpr, BLOCK: tl.constexpr):
    # Rows of the block alone: sums with `first` were kept in registers from load_block's to here, and spilled.
    rows, cols = tl.arange(0, BLOCK), tl.arange(0, config.BLOCK_D)
    origin = x.ptr + tl.cast(span.batch, tl.int64) * x.stride_batch + head.to(tl.int64) * x.stride_head
    ptrs = origin + (span.start + first + rows).to(tl.int64)[:, None] * x.stride_token + cols[None, :]
    mask = (rows < span.length - first)[:, None] & (cols < config.D)[None, :]
    tl.store(ptrs, values.to(x.ptr.dtype.element_ty), mask=mask)


@triton.jit
def padded(T):
    """Elements from one row of shift and delta to the next: attention_launch.padded."""
    return multiple_of_16(T + 15)


@triton.jit
def row_offsets(span, head, num_heads, T_q, rows):
    """Where numbers of these queries lie, in (B, H, T) or (H, total)."""
    return ((span.batch * num_heads + head).to(tl.int64) * T_q + span.start) + rows


# Scores, probabilities and their gradients: each formula stands here once


@triton.jit
def tanh_of_scaled(x, scale, scoring):
    """tanh(scale * x), by exp2; of float32 below 1, where that would cancel, by Lambert's continued fraction.

    16 bits hide what cancels, 2^-23. There the reciprocal is the square of a root: two instructions, a quotient takes
    eight.
    """
    if scoring.scale_exp is None:
        root = tl.rsqrt(1.0 + tl.exp2(x * (2.0 * LOG2E * scale)))
        return 1.0 - 2.0 * (root * root)
    x *= scale
    square = x * x
    small = x * (945.0 + square * (105.0 + square)) / (945.0 + square * (420.0 + 15.0 * square))
    return tl.where(square < 1.0, small, 1.0 - 2.0 / (1.0 + tl.exp2(2.0 * LOG2E * x)))


@triton.jit
def exp_or_exp2(x, scoring):
    return tl.exp2(x) if scoring.scale_exp is None else tl.exp(x)


@triton.jit
def to_log2(x, scoring):
    """A natural logarithm as the exponent of exp_or_exp2."""
    return x * LOG2E if scoring.scale_exp is None else x


@triton.jit
def load_slope(scoring, tile, head):
    """ALiBi's slope, divided by scale_log2 as scores are."""
    if scoring.slopes_ptr is None:
        return scoring.scale_log2 * 0.0
    else:
        exists = (tile.q.length > 0) & (tile.k.length > 0)  # what follows the last sequence has no slope
        slope = tl.load(scoring.slopes_ptr + tile.seq_idx * scoring.stride_slopes + head, mask=exists, other=0.0)
        return to_log2(slope.to(tl.float32), scoring) / scoring.scale_log2


@triton.jit
def score(product, distance, slope, scoring):
    """(score / scale_log2, tanh or product) of q . k and the query's position minus the key's."""
    capped = tanh_of_scaled(product, scoring.scale_tanh, scoring) if scoring.scale_tanh is not None else product
    s = capped if scoring.scale_exp is None else capped * scoring.scale_exp
    if scoring.slopes_ptr is not None:
        s -= slope * tl.abs(distance).to(tl.float32)
    return s, capped


@triton.jit
def hide(x, hidden: tl.constexpr, first, positions, before, after, length, REGION: tl.constexpr):
    """x, or `hidden` where a row does not see a column, in a block of this region: see block_ranges.

    first      the column at which the block begins
    positions  of the rows among the columns; they see `before` columns before it and `after` behind it, None for all
    length     of the columns, or None if hidden elsewhere

    One comparison a side and element: of how far a row sees and where the columns end the nearer is taken for the row.
    Both are counted from the first column, so that the block's own numbers need no registers.
    """
    cols, positions = tl.arange(0, x.shape[1]), positions - first
    if REGION == LEFT_EDGE and before is not None:
        x = tl.where(cols[None, :] >= (positions - before)[:, None], x, hidden)
    if REGION != IN_FULL and (after is not None or length is not None):
        if length is None:
            last = positions + after
        elif after is None:
            last = tl.zeros_like(positions) + (length - first - 1)
        else:
            last = tl.minimum(positions + after, length - first - 1)
        x = tl.where(cols[None, :] <= last[:, None], x, hidden)
    return x


@triton.jit
def is_kept(dropout, tile, head, queries, first_key, config: tl.constexpr):
    """Whether dropout keeps each of a block of probabilities. Four keys share a draw."""
    groups = first_key // 4 + tl.arange(0, config.BLOCK_N // 4)
    counters = groups[None, :], queries[:, None], head, tile.seq_idx
    return kernel_is_kept(dropout, tl.load(dropout.seed_ptr), *counters, config.BLOCK_M, config.BLOCK_N)


@triton.jit
def online_softmax(s, m_i, l_i, scoring):
    """(p of these scores, the factor that rescales what came before, the new maximum and sum)."""
    m = tl.maximum(m_i, tl.max(s, axis=1))
    # A row that has seen no key has a maximum of -inf, and -inf - -inf would be NaN.
    shift = tl.where(m == float("-inf"), 0.0, m * scoring.scale_log2)
    p = exp_or_exp2(s * scoring.scale_log2 - shift[:, None], scoring)
    rescale = exp_or_exp2(m_i * scoring.scale_log2 - shift, scoring)
    return p, rescale, m, l_i * rescale + tl.sum(p, axis=1)


@triton.jit
def probabilities(product, distance, shift, slope, scoring):
    """(p, tanh or product) of q . k, elementwise."""
    s, capped = score(product, distance, slope, scoring)
    return exp_or_exp2(s * scoring.scale_log2 - shift, scoring), capped


@triton.jit
def drop(x, kept, dropout):
    """What dropout makes of a block of probabilities, or of their gradients."""
    return x if dropout.seed_ptr is None else tl.where(kept, x * dropout.kept_factor, 0.0)


@triton.jit
def gradient_of_scores(p, capped, dp, delta, scoring):
    """(ds, dproduct / scale), elementwise; dp after dropout."""
    ds = p * (dp - delta)
    return ds, ds if scoring.scale_tanh is None else ds * (1.0 - capped * capped)


# Forward


@triton.jit
def initial_max_and_sum(scoring, varlen, scheduler, tile, BLOCK_M: tl.constexpr):
    """(m_i, l_i) before any key: of nothing, or of the sink, which is a key without a value."""
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    if scoring.sinks_ptr is not None:
        sink = tl.load(scoring.sinks_ptr + tile.head).to(tl.float32)
        if varlen.tiles_ptr is not None:
            sink = tl.where(tile.seq_idx == scheduler.num_seqs, float("-inf"), sink)
        m_i = to_log2(sink, scoring) / scoring.scale_log2 + l_i
        l_i += tl.where(sink == float("-inf"), 0.0, 1.0)
    return m_i, l_i


@triton.jit
def forward_inner(
    acc, m_i, l_i, q, k, v, start, end, tile, slope, scoring, dropout, config: tl.constexpr, REGION: tl.constexpr
):
    """(acc, m_i, l_i) after the keys from start to end."""
    queries = tile.block * config.BLOCK_M + tl.arange(0, config.BLOCK_M)
    positions = queries + tile.k.length - tile.q.length
    key_head = tile.head // config.GROUP_SIZE
    for first in tl.range(start, end, config.BLOCK_N):
        keys = first + tl.arange(0, config.BLOCK_N)
        # Keys of the next sequence, which TMA loads behind the end, may stay: their scores are hidden.
        MASKED_K: tl.constexpr = REGION != IN_FULL and not config.USE_TMA
        k_block = load_streamed(k, tile.k, key_head, first, config, config.BLOCK_N, MASKED_K)
        distance = positions[:, None] - keys[None, :]
        s, _ = score(tl.dot(q, tl.trans(k_block), input_precision="ieee"), distance, slope, scoring)
        s = hide(s, float("-inf"), first, positions, scoring.window_left, scoring.window_right, tile.k.length, REGION)
        p, rescale, m_i, l_i = online_softmax(s, m_i, l_i, scoring)
        if dropout.seed_ptr is not None:
            p = tl.where(is_kept(dropout, tile, tile.head, queries, first, config), p, 0.0)
        v_block = load_streamed(v, tile.k, key_head, first, config, config.BLOCK_N, REGION != IN_FULL)
        acc = tl.dot(p.to(v_block.dtype), v_block, acc * rescale[:, None], input_precision="ieee")
    return acc, m_i, l_i


@triton.jit
def normalized_out_and_lse(acc, m_i, l_i, scoring, dropout, dtype: tl.constexpr):
    """(out, lse); 0 and -inf for a row that saw no key."""
    empty = l_i == 0.0
    total = tl.where(empty, 1.0, l_i)
    # delta has the error of this quotient, and a dq that few keys give cancels to little more.
    acc *= quotient(dropout.kept_factor if dropout.seed_ptr is not None else 1.0, total, dtype)[:, None]
    if scoring.scale_exp is not None:
        lse = m_i * scoring.scale_log2 + tl.log(total)
    else:
        lse = (m_i * scoring.scale_log2 + tl.log2(total)) * LN2
    return acc, tl.where(empty, float("-inf"), lse)


@triton.jit(do_not_specialize=DYNAMIC_SIZES)
def forward_kernel(
    q,
    k,  # Heads, or a descriptor of (B, Hk, T, D)
    v,  # like k
    out,
    remainder,  # Heads of REMAINDER_SCALE * (the result - out), or None
    lse_ptr,  # (B, H, T) or (H, total)
    scoring,
    dropout,
    varlen,
    num_blocks,  # from here to T_k the fields of TileScheduler
    num_bh,
    swizzle_group,
    num_heads,
    num_seqs,
    T_q,
    T_k,
    GROUP_SIZE: tl.constexpr,
    D: tl.constexpr,
    USE_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    config: tl.constexpr = Config(D, BLOCK_M, BLOCK_N, BLOCK_D, GROUP_SIZE, varlen.tiles_ptr is not None, USE_TMA)
    scheduler = TileScheduler(num_blocks, num_bh, swizzle_group, num_heads, num_seqs, T_q, T_k)
    tile = get_work_tile(scheduler, varlen, False)
    if tile.seq_idx < 0:
        return
    first = tile.block * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    q_block = load_block(q, tile.q, tile.head, first, config, BLOCK_M, True)
    slope = load_slope(scoring, tile, tile.head)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m_i, l_i = initial_max_and_sum(scoring, varlen, scheduler, tile, BLOCK_M)

    shift = tile.k.length - tile.q.length
    last = tl.minimum(first + BLOCK_M, tile.q.length) - 1
    bounds = block_ranges(
        first + shift, last + shift, scoring.window_left, scoring.window_right, tile.k.length, BLOCK_N
    )
    for REGION in tl.static_range(3):
        if REGION != LEFT_EDGE or scoring.window_left is not None:
            acc, m_i, l_i = forward_inner(
                acc, m_i, l_i, q_block, k, v, bounds[REGION], bounds[REGION + 1], tile, slope, scoring, dropout, config,
                REGION,
            )  # fmt: skip

    acc, lse = normalized_out_and_lse(acc, m_i, l_i, scoring, dropout, out.ptr.dtype.element_ty)
    store_block(out, acc, tile.q, tile.head, first, config, BLOCK_M)
    if remainder is not None:
        lost = (acc - acc.to(out.ptr.dtype.element_ty).to(tl.float32)) * REMAINDER_SCALE
        store_block(remainder, lost, tile.q, tile.head, first, config, BLOCK_M)
    offsets = row_offsets(tile.q, tile.head, scheduler.num_heads, scheduler.T_q, rows)
    tl.store(lse_ptr + offsets, lse, mask=rows < tile.q.length)


# Backward


@triton.jit(do_not_specialize=DYNAMIC_SIZES)
def delta_kernel(
    out,
    remainder,
    dout,
    dlse_ptr,  # (B, H, T) or (H, total) contiguous, or None
    lse_ptr,  # (B, H, T) or (H, total)
    shift_ptr,  # (B, H, padded(T)) or (H, padded(total))
    delta_ptr,  # like shift
    T,
    num_heads,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    config: tl.constexpr = Config(D, BLOCK_M, None, BLOCK_D, None, False, False)
    num_blocks = tl.cdiv(T, BLOCK_M)
    bh, first = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks * BLOCK_M
    span, head = Span(bh // num_heads, 0, T), bh % num_heads
    o = load_block(out, span, head, first, config, BLOCK_M, True).to(tl.float32)
    if remainder is not None:
        lost = load_block(remainder, span, head, first, config, BLOCK_M, True)
        o += lost.to(tl.float32) / REMAINDER_SCALE
    do = load_block(dout, span, head, first, config, BLOCK_M, True)
    delta = tl.sum(o * do.to(tl.float32), axis=1)
    rows = first + tl.arange(0, BLOCK_M)
    offsets, mask = bh.to(tl.int64) * T + rows, rows < T
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + offsets, mask=mask, other=0.0)
    # A row that saw no key has no gradient, whatever dout and dlse hold: with a shift of inf its p is 0. Nor have the
    # rows that pad shift and delta.
    lse = tl.load(lse_ptr + offsets, mask=mask, other=float("-inf"))
    saw_none = lse == float("-inf")
    shift = lse if out.ptr.dtype.element_ty == tl.float32 else lse * LOG2E
    padded_offsets = bh.to(tl.int64) * padded(T) + rows
    tl.store(shift_ptr + padded_offsets, tl.where(saw_none, float("inf"), shift), mask=rows < padded(T))
    tl.store(delta_ptr + padded_offsets, tl.where(saw_none, 0.0, delta), mask=rows < padded(T))


@triton.jit
def load_rows(
    x, tile, head, num_heads, T_q, first, other, config: tl.constexpr, BY_TMA: tl.constexpr, MASKED: tl.constexpr
):
    """Of a block of queries what delta_kernel leaves, shift or delta; `other` for rows behind the last query.

    With a shift of inf their p is 0. So is that of the rows that pad a dense tensor's: a mask that ends behind them
    leaves loads wide.
    """
    rows = first + tl.arange(0, config.BLOCK_M)
    if BY_TMA:
        block = x.load([tile.q.batch * num_heads + head, tile.q.start + first]).reshape(config.BLOCK_M)
        if MASKED:
            block = tl.where(rows < tile.q.length, block, other)
        return block
    else:
        offsets = row_offsets(tile.q, head, num_heads, padded(T_q), rows)
        if MASKED:
            length = tile.q.length if config.VARLEN else padded(T_q)
            return tl.load(x + offsets, mask=rows < length, other=other)
        else:
            return tl.load(x + offsets)


@triton.jit
def dq_inner(
    dq, dslope, q, do, shift, delta, k, v, start, end, tile, slope, scoring, dropout, config: tl.constexpr,
    HAS_DSLOPE: tl.constexpr, REGION: tl.constexpr,
):  # fmt: skip
    """dq and the rows' slope gradients, with those from the keys from start to end added."""
    queries = tile.block * config.BLOCK_M + tl.arange(0, config.BLOCK_M)
    positions = queries + tile.k.length - tile.q.length
    key_head = tile.head // config.GROUP_SIZE
    for first in tl.range(start, end, config.BLOCK_N):
        keys = first + tl.arange(0, config.BLOCK_N)
        k_block = load_streamed(k, tile.k, key_head, first, config, config.BLOCK_N, REGION != IN_FULL)
        product = tl.dot(q, tl.trans(k_block), input_precision="ieee")
        distance = positions[:, None] - keys[None, :]
        p, capped = probabilities(product, distance, shift[:, None], slope, scoring)
        p = hide(p, 0.0, first, positions, scoring.window_left, scoring.window_right, tile.k.length, REGION)
        # v and dp only now: beside the scores they would take registers.
        v_block = load_streamed(v, tile.k, key_head, first, config, config.BLOCK_N, REGION != IN_FULL)
        dp = tl.dot(do, tl.trans(v_block), input_precision="ieee")
        if dropout.seed_ptr is not None:
            dp = drop(dp, is_kept(dropout, tile, tile.head, queries, first, config), dropout)
        ds, dproduct = gradient_of_scores(p, capped, dp, delta[:, None], scoring)
        dq = tl.dot(dproduct.to(k_block.dtype), k_block, dq, input_precision="ieee")
        if HAS_DSLOPE:
            dslope -= tl.sum(ds * tl.abs(distance).to(tl.float32), axis=1)
    return dq, dslope


@triton.jit(do_not_specialize=DYNAMIC_SIZES)
def dq_kernel(
    q,
    k,  # Heads, or a descriptor of (B, Hk, T, D)
    v,  # like k
    dout,
    dq_heads,
    shift_ptr,  # (B, H, padded(T)) or (H, padded(total))
    delta_ptr,  # like shift
    dslope_partial_ptr,  # (B, H, T) or (H, total): each row's part of its slope's gradient; or None
    scale,
    scoring,
    dropout,
    varlen,
    num_blocks,  # from here to T_k the fields of TileScheduler
    num_bh,
    swizzle_group,
    num_heads,
    num_seqs,
    T_q,
    T_k,
    GROUP_SIZE: tl.constexpr,
    D: tl.constexpr,
    USE_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    config: tl.constexpr = Config(D, BLOCK_M, BLOCK_N, BLOCK_D, GROUP_SIZE, varlen.tiles_ptr is not None, USE_TMA)
    scheduler = TileScheduler(num_blocks, num_bh, swizzle_group, num_heads, num_seqs, T_q, T_k)
    tile = get_work_tile(scheduler, varlen, False)
    if tile.seq_idx < 0:
        return
    first = tile.block * BLOCK_M
    shift_block = load_rows(shift_ptr, tile, tile.head, num_heads, T_q, first, float("inf"), config, False, True)
    delta = load_rows(delta_ptr, tile, tile.head, num_heads, T_q, first, 0.0, config, False, True)
    q_block = load_block(q, tile.q, tile.head, first, config, BLOCK_M, True)
    do = load_block(dout, tile.q, tile.head, first, config, BLOCK_M, True)
    slope = load_slope(scoring, tile, tile.head)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dslope = tl.zeros([BLOCK_M], tl.float32)

    shift = tile.k.length - tile.q.length
    last = tl.minimum(first + BLOCK_M, tile.q.length) - 1
    bounds = block_ranges(
        first + shift, last + shift, scoring.window_left, scoring.window_right, tile.k.length, BLOCK_N
    )
    for REGION in tl.static_range(3):
        if REGION != LEFT_EDGE or scoring.window_left is not None:
            dq, dslope = dq_inner(
                dq, dslope, q_block, do, shift_block, delta, k, v, bounds[REGION], bounds[REGION + 1], tile, slope,
                scoring, dropout, config, dslope_partial_ptr is not None, REGION,
            )  # fmt: skip

    store_block(dq_heads, dq * scale, tile.q, tile.head, first, config, BLOCK_M)
    if dslope_partial_ptr is not None:
        rows = first + tl.arange(0, BLOCK_M)
        offsets = row_offsets(tile.q, tile.head, scheduler.num_heads, scheduler.T_q, rows)
        tl.store(dslope_partial_ptr + offsets, dslope, mask=rows < tile.q.length)


@triton.jit
def dkdv_inner(
    dk, dv, k, v, q, dout, shift_rows, delta_rows, start, end, tile, scoring, dropout, scheduler,
    config: tl.constexpr, REGION: tl.constexpr, ZEROS_BEHIND: tl.constexpr,
):  # fmt: skip
    """dk and dv with those from the queries from start to end of all heads added. Scores are (keys, queries) here.

    One loop goes over the blocks of all heads of the group: a nested one would refill its pipeline for each, and spill.
    """
    keys = tile.block * config.BLOCK_N + tl.arange(0, config.BLOCK_N)
    positions = keys - (tile.k.length - tile.q.length)
    BY_TMA: tl.constexpr = config.USE_TMA and not config.VARLEN  # shift and delta
    if not BY_TMA:  # Wide loads need a start that is known as a multiple. It is one wherever a block is left.
        start = tl.cdiv(start, config.BLOCK_M) * config.BLOCK_M
    num_blocks = tl.cdiv(end - start, config.BLOCK_M)
    for step in tl.range(0, config.GROUP_SIZE * num_blocks):
        head, first = tile.head * config.GROUP_SIZE, start + step * config.BLOCK_M
        if config.GROUP_SIZE > 1:
            head, first = head + step // num_blocks, start + step % num_blocks * config.BLOCK_M
        slope = load_slope(scoring, tile, head)
        queries = first + tl.arange(0, config.BLOCK_M)
        q_block = load_streamed(q, tile.q, head, first, config, config.BLOCK_M, REGION != IN_FULL)
        do = load_streamed(dout, tile.q, head, first, config, config.BLOCK_M, REGION != IN_FULL)
        num_heads = scheduler.num_heads * config.GROUP_SIZE
        MASKED_ROWS: tl.constexpr = REGION != IN_FULL and not ZEROS_BEHIND
        shift = load_rows(
            shift_rows, tile, head, num_heads, scheduler.T_q, first, float("inf"), config, BY_TMA, MASKED_ROWS
        )
        if k.dtype == tl.float32:  # to the bit as in forward: else exp(s - lse) of a dominant key would not be 1
            product = tl.trans(tl.dot(q_block, tl.trans(k), input_precision="ieee"))
        else:
            product = tl.dot(k, tl.trans(q_block), input_precision="ieee")
        distance = queries[None, :] - positions[:, None]
        kept = None
        if dropout.seed_ptr is not None:
            kept = tl.trans(is_kept(dropout, tile, head, queries, tile.block * config.BLOCK_N, config))
        p, capped = probabilities(product, distance, shift[None, :], slope, scoring)
        # Of rows behind the last query p is 0 already.
        p = hide(p, 0.0, first, positions, scoring.window_right, scoring.window_left, None, REGION)
        # dp and delta only now: beside the scores they would take registers that larger blocks need.
        dv = tl.dot(drop(p, kept, dropout).to(do.dtype), do, dv, input_precision="ieee")
        dp = drop(tl.dot(v, tl.trans(do), input_precision="ieee"), kept, dropout)
        delta = load_rows(delta_rows, tile, head, num_heads, scheduler.T_q, first, 0.0, config, BY_TMA, MASKED_ROWS)
        _, dproduct = gradient_of_scores(p, capped, dp, delta[None, :], scoring)
        dk = tl.dot(dproduct.to(q_block.dtype), q_block, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=DYNAMIC_SIZES)
def dkdv_kernel(
    q,  # Heads, or a descriptor of (B, H, T, D)
    k,
    v,
    dout,  # like q
    dk_heads,
    dv_heads,
    shift_rows,  # (B, H, padded(T)) or (H, padded(total)), or by TMA and dense a descriptor of (B * H, T)
    delta_rows,  # like shift_rows
    scale,
    scoring,
    dropout,
    varlen,
    num_blocks,  # from here to T_k the fields of TileScheduler
    num_bh,
    swizzle_group,
    num_heads,
    num_seqs,
    T_q,
    T_k,
    GROUP_SIZE: tl.constexpr,
    D: tl.constexpr,
    USE_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    config: tl.constexpr = Config(D, BLOCK_M, BLOCK_N, BLOCK_D, GROUP_SIZE, varlen.tiles_ptr is not None, USE_TMA)
    scheduler = TileScheduler(num_blocks, num_bh, swizzle_group, num_heads, num_seqs, T_q, T_k)
    tile = get_work_tile(scheduler, varlen, True)
    if tile.seq_idx < 0:
        return
    first = tile.block * BLOCK_N
    # Not by TMA: of calls without a mask ptxas then ran one product after the other (C7515), and D 256 spilled.
    k_block = load_block(k, tile.k, tile.head, first, config, BLOCK_N, True)
    v_block = load_block(v, tile.k, tile.head, first, config, BLOCK_N, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    # Seen from a key, the window's sides change places.
    shift = tile.q.length - tile.k.length
    last = tl.minimum(first + BLOCK_N, tile.k.length) - 1
    bounds = block_ranges(
        first + shift, last + shift, scoring.window_right, scoring.window_left, tile.q.length, BLOCK_M
    )
    # What TMA loads from behind the last query of a batch row is 0, its shift and delta too. Then p is 1, ALiBi aside,
    # and adds nothing: no block need be masked for it.
    ZEROS_BEHIND: tl.constexpr = USE_TMA and varlen.tiles_ptr is None and scoring.slopes_ptr is None
    ENDS_IN_FULL: tl.constexpr = ZEROS_BEHIND and scoring.window_left is None
    if ENDS_IN_FULL:
        bounds = bounds[0], bounds[1], bounds[3], bounds[3]
    FIRST: tl.constexpr = IN_FULL if scoring.window_right is None else LEFT_EDGE
    LAST: tl.constexpr = IN_FULL if ENDS_IN_FULL else RIGHT_EDGE
    for REGION in tl.static_range(3):
        if REGION >= FIRST and REGION <= LAST:
            dk, dv = dkdv_inner(
                dk, dv, k_block, v_block, q, dout, shift_rows, delta_rows, bounds[REGION], bounds[REGION + 1], tile,
                scoring, dropout, scheduler, config, REGION, ZEROS_BEHIND,
            )  # fmt: skip

    store_block(dk_heads, dk * scale, tile.k, tile.head, first, config, BLOCK_N)
    store_block(dv_heads, dv, tile.k, tile.head, first, config, BLOCK_N)


# Varlen: which block of which sequence each program takes


@triton.jit
def blocks_and_work(
    seq_idx, cu_seqlens_q_ptr, cu_seqlens_k_ptr, num_seqs, total_q, total_k, OVER_KEYS: tl.constexpr,
    GROWING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(num_blocks, work) of a sequence. If GROWING its block of rank c, lightest first, is work + (c + 1) * BLOCK,
    else every block is work."""
    _, q_length = seq_bounds(cu_seqlens_q_ptr, seq_idx, num_seqs, total_q)
    _, k_length = seq_bounds(cu_seqlens_k_ptr, seq_idx, num_seqs, total_k)
    num_blocks = tl.cdiv(k_length if OVER_KEYS else q_length, BLOCK)
    if GROWING:
        keys = tl.where(seq_idx == num_seqs, 0, k_length)
        return num_blocks, keys - (num_blocks * BLOCK if OVER_KEYS else q_length)
    else:
        return num_blocks, tl.where(seq_idx == num_seqs, 0, q_length if OVER_KEYS else k_length)


@triton.jit(do_not_specialize=DYNAMIC_SIZES)
def schedule_kernel(
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    tiles_ptr,  # (num_tiles, 2), filled with -1
    num_tiles,
    num_seqs,
    total_q,
    total_k,
    OVER_KEYS: tl.constexpr,
    GROWING: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
):
    """One program per sequence lists its blocks after all heavier ones and equally heavy ones of earlier sequences."""
    seq_idx = tl.program_id(0)
    num_blocks, work = blocks_and_work(
        seq_idx, cu_seqlens_q_ptr, cu_seqlens_k_ptr, num_seqs, total_q, total_k, OVER_KEYS, GROWING, BLOCK
    )
    for first in range(0, num_blocks, BLOCK_RANKS):
        ranks = first + tl.arange(0, BLOCK_RANKS)
        slots = tl.zeros([BLOCK_RANKS], tl.int32)
        for start in range(0, num_seqs + 1, BLOCK_SEQS):
            others = start + tl.arange(0, BLOCK_SEQS)
            other_blocks, other_work = blocks_and_work(
                others, cu_seqlens_q_ptr, cu_seqlens_k_ptr, num_seqs, total_q, total_k, OVER_KEYS, GROWING, BLOCK
            )
            if GROWING:
                excess = tl.maximum(work + (ranks[:, None] + 1) * BLOCK - other_work[None, :], 0)
                ahead = tl.maximum(other_blocks[None, :] - excess // BLOCK, 0)
                as_heavy = (excess > 0) & (excess % BLOCK == 0) & (excess // BLOCK <= other_blocks[None, :])
                ahead += tl.where(as_heavy & (others < seq_idx)[None, :], 1, 0)
            else:
                precedes = (other_work > work) | ((other_work == work) & (others < seq_idx))
                own = tl.where(others == seq_idx, 1, 0) * ranks[:, None]
                ahead = tl.where(precedes, other_blocks, 0)[None, :] + own
            slots += tl.sum(ahead, axis=1)
        mask = (ranks < num_blocks) & (slots < num_tiles)  # decreasing cu_seqlens must not make it write elsewhere
        tl.store(tiles_ptr + 2 * slots, tl.full([BLOCK_RANKS], seq_idx, tl.int32), mask=mask)
        tl.store(tiles_ptr + 2 * slots + 1, num_blocks - 1 - ranks if OVER_KEYS else ranks, mask=mask)


@triton.jit(do_not_specialize=DYNAMIC_SIZES)
def sequence_sums_kernel(
    x_ptr,  # (H, total) float32
    sums_ptr,  # (num_seqs, H)
    cu_seqlens_ptr,
    num_seqs,
    total,
    H,
    BLOCK: tl.constexpr,
):
    """One program per sequence and head."""
    seq_idx, head = tl.program_id(0) // H, tl.program_id(0) % H
    start, length = seq_bounds(cu_seqlens_ptr, seq_idx, num_seqs, total)
    partial = tl.zeros([BLOCK], tl.float32)
    for first in range(0, length, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        partial += tl.load(x_ptr + head.to(tl.int64) * total + start + rows, mask=rows < length, other=0.0)
    tl.store(sums_ptr + seq_idx * H + head, tl.sum(partial, axis=0).to(sums_ptr.dtype.element_ty))
