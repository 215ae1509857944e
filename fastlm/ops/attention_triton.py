"""The Triton kernels of fastlm/ops/attention.py, forward and backward, for dense tensors and packed documents alike.

Scores are kept as s = unit * r, in powers of two: r is the bare product q . k, unit is scale * log2(e), and the
multiplication becomes part of the one that exp2 needs anyway. With a softcap r is the tanh, unit the cap * log2(e).

forward   a program per block of queries and head goes over the keys these see, with a running maximum and sum
delta     delta_i = o_i . do_i - dlse_i: what is subtracted from every dp of row i, so dlse costs nothing further on;
          with dropout, where even a single key does not cancel to the bit, o_i is out and what rounding took from it
dq        a program per block of queries and head, over the keys as in forward
dkdv      a program per block of keys and key head, over the queries that see them, of all the heads that share it
Backward makes the products q . k and do . v twice, and in return adds everything up in a fixed order, without atomics.

A program's way along the other sequence is cut in three: blocks at the left edge of what is visible, blocks that all of
its rows see, blocks at the right edge. Only at the edges is a mask computed. Blocks that nobody sees are never loaded.

Packed documents: one small kernel writes down which (document, block) each program takes, those with the most work
first. It reads cu_seqlens on the device; the host knows only how many entries there can be at most. The tokens after
the last document count as one more, which sees nothing: so these kernels write every element of every result.

Where the chip has a copy engine for tiles (sm_90 and newer) the tiles of the inner loops come through descriptors.
"""

# mypy: disallow-untyped-defs=False
# (only the kernels have none: Triton gives their arguments types at each launch)

from typing import Any, NamedTuple

from fastlm.ops._dropout import kernel_uniform
from fastlm.ops._triton import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
REMAINDER_SCALE = tl.constexpr(256.0)  # below 1 / eps of both 16-bit types; keeps small remainders of float16 normal


# What the kernels take, in groups


class Heads(NamedTuple):
    """A tensor (B, T, H, D), or (total, H, D) as if B were 1, whose features lie side by side."""

    ptr: Any
    stride_batch: Any
    stride_token: Any
    stride_head: Any


class Scoring(NamedTuple):
    """How a product becomes a score, and which keys a query sees."""

    unit: Any
    natural: Any  # scale or softcap, if the score is formed at once, and unit is 1; None if unit comes with exp2
    cap: Any  # scale / softcap, or None
    before: Any  # how many keys before it a query sees, or None for all
    after: Any
    slopes_ptr: Any  # of ALiBi, or None
    stride_slopes: Any  # from one batch row or document to the next
    sinks_ptr: Any  # (H,), or None


class Dropout(NamedTuple):
    """Which probabilities are zeroed; seed_ptr is None for none."""

    seed_ptr: Any
    p: Any
    factor: Any  # of those that are kept


class Packing(NamedTuple):
    """Where documents begin, and which blocks of them the programs take; all None if the tensors are dense."""

    cu_seqlens_q_ptr: Any
    cu_seqlens_k_ptr: Any
    num_documents: Any
    tiles_ptr: Any  # (grid.blocks, 2): document and block, or -1 for no work


class Grid(NamedTuple):
    """Which programs there are: blocks for each pair, of batch row and head, or of all documents and head."""

    blocks: Any
    pairs: Any
    section: Any  # so many pairs at a time: what they read together stays in the L2 cache
    num_heads: Any
    T_q: Any  # tokens in a batch row, or in all documents
    T_k: Any


class Place(NamedTuple):
    """What a program works on: a block of a head of one segment, which is a batch row or a document."""

    segment: Any
    head: Any
    block: Any
    batch: Any
    q_start: Any
    q_length: Any
    k_start: Any
    k_length: Any


# Where a program works


@triton.jit
def document_bounds(cu_seqlens_ptr, document, num_documents, total):
    """(first token, number of tokens). Document num_documents is what lies behind the last. Never outside the total."""
    start = tl.load(cu_seqlens_ptr + document, mask=document <= num_documents, other=total)
    end = tl.load(cu_seqlens_ptr + document + 1, mask=document < num_documents, other=total)
    start = tl.minimum(tl.maximum(start, 0), total).to(tl.int32)
    return start, tl.maximum(tl.minimum(end, total).to(tl.int32) - start, 0)


@triton.jit
def place_of_program(grid, packing, OVER_KEYS: tl.constexpr):
    """The work of this program. Without any, segment is -1."""
    first_pair = tl.program_id(0) // (grid.blocks * grid.section) * grid.section
    within = tl.program_id(0) % (grid.blocks * grid.section)
    pairs = tl.minimum(grid.section, grid.pairs - first_pair)
    pair, turn = first_pair + within % pairs, within // pairs
    if packing.tiles_ptr is None:
        # Causal work is heaviest at the end for queries, at the start for keys.
        block = turn if OVER_KEYS else grid.blocks - 1 - turn
        segment = pair // grid.num_heads
        zero = segment * 0
        return Place(segment, pair % grid.num_heads, block, segment, zero, zero + grid.T_q, zero, zero + grid.T_k)
    else:
        segment = tl.load(packing.tiles_ptr + 2 * turn)
        block = tl.load(packing.tiles_ptr + 2 * turn + 1)
        known = tl.maximum(segment, 0)
        n = packing.num_documents
        q_start, q_length = document_bounds(packing.cu_seqlens_q_ptr, known, n, grid.T_q)
        k_start, k_length = document_bounds(packing.cu_seqlens_k_ptr, known, n, grid.T_k)
        if OVER_KEYS:
            q_length = tl.where(segment == n, 0, q_length)
        else:
            k_length = tl.where(segment == n, 0, k_length)
        return Place(segment, pair, block, segment * 0, q_start, q_length, k_start, k_length)


@triton.jit
def visible_blocks(first, last, before, after, length, BLOCK: tl.constexpr):
    """(start, whole_start, whole_end, end): where the rows first..last, which see `before` and `after`, find a block.

    Blocks from start to end are seen by some row, those from whole_start to whole_end by all of them in full.
    """
    start = first * 0
    whole_start = start
    end = start + length
    whole_end = end
    if before is not None:
        start = tl.maximum(first - before, 0) // BLOCK * BLOCK
        whole_start = tl.maximum(last - before, 0)
    if after is not None:
        end = tl.minimum(last + after + 1, length)
        whole_end = tl.minimum(first + after + 1, length)
    end = tl.maximum(end, start)
    whole_start = tl.minimum(tl.maximum(tl.cdiv(whole_start, BLOCK) * BLOCK, start), end)
    whole_end = tl.maximum(tl.maximum(whole_end, 0) // BLOCK * BLOCK, whole_start)
    return start, whole_start, whole_end, end


@triton.jit
def load_rows(
    x, batch, start, length, head, first, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr, PACKED: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """(BLOCK, BLOCK_D): the rows from `first` on of a segment; zero where it ends, and from feature D on."""
    rows = first + tl.arange(0, BLOCK)
    if DESCRIPTOR:
        tile = x.load([batch, head, start + first, 0]).reshape(BLOCK, BLOCK_D)
        if PACKED and not WHOLE:  # the next document's values may be anything, and 0 * NaN is NaN
            tile = tl.where((rows < length)[:, None], tile, 0.0)
        return tile
    else:
        cols = tl.arange(0, BLOCK_D)
        token = (start + first).to(tl.int64)
        origin = x.ptr + batch.to(tl.int64) * x.stride_batch + head.to(tl.int64) * x.stride_head
        ptrs = (
            origin
            + token * x.stride_token
            + (tl.arange(0, BLOCK).to(tl.int64)[:, None] * x.stride_token + cols[None, :])
        )
        if WHOLE and D == BLOCK_D:
            return tl.load(ptrs)
        elif WHOLE:
            return tl.load(ptrs, mask=(cols < D)[None, :], other=0.0)
        else:
            return tl.load(ptrs, mask=(rows < length)[:, None] & (cols < D)[None, :], other=0.0)


@triton.jit
def store_rows(
    x, values, batch, start, length, head, first, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    rows, cols = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    origin = x.ptr + batch.to(tl.int64) * x.stride_batch + head.to(tl.int64) * x.stride_head
    ptrs = origin + (start + rows).to(tl.int64)[:, None] * x.stride_token + cols[None, :]
    mask = (rows < length)[:, None] & (cols < D)[None, :]
    tl.store(ptrs, values.to(x.ptr.dtype.element_ty), mask=mask)


@triton.jit
def row_offsets(place, head, num_heads, T_q, rows):
    """Where lse and delta of these queries lie, in (B, H, T) or (H, total)."""
    return ((place.batch * num_heads + head).to(tl.int64) * T_q + place.q_start) + rows


# Scores, probabilities and their gradients: each formula stands here once


@triton.jit
def tanh(x):
    """By exp2; below 1, where that would cancel, by Lambert's continued fraction."""
    square = x * x
    small = x * (945.0 + square * (105.0 + square)) / (945.0 + square * (420.0 + 15.0 * square))
    return tl.where(square < 1.0, small, 1.0 - 2.0 / (1.0 + tl.exp2(2.8853900817779268 * x)))


@triton.jit
def power(x, scoring):
    """e^x or 2^x, as the unit wants it."""
    return tl.exp2(x) if scoring.natural is None else tl.exp(x)


@triton.jit
def as_power(lse, scoring):
    """What of a natural logarithm is to be subtracted from scores."""
    return lse * LOG2E if scoring.natural is None else lse


@triton.jit
def in_units(x, scoring):
    """A part of a score, as score() counts them."""
    return as_power(x, scoring) / scoring.unit


@triton.jit
def slope_of(scoring, place, head):
    """ALiBi's slope in the unit of the scores."""
    if scoring.slopes_ptr is None:
        return scoring.unit * 0.0
    else:
        exists = (place.q_length > 0) & (place.k_length > 0)  # what lies behind the last document has no slope
        slope = tl.load(scoring.slopes_ptr + place.segment * scoring.stride_slopes + head, mask=exists, other=0.0)
        return in_units(slope.to(tl.float32), scoring)


@triton.jit
def score(product, distance, slope, scoring):
    """(the score but for its unit, what it was before ALiBi), of q . k and how far the key lies before the query."""
    capped = tanh(product * scoring.cap) if scoring.cap is not None else product
    s = capped if scoring.natural is None else capped * scoring.natural
    if scoring.slopes_ptr is not None:
        s -= slope * tl.abs(distance).to(tl.float32)
    return s, capped


@triton.jit
def sees(distance, scoring):
    """Whether a query sees a key that lies this far before it."""
    visible = distance == distance
    if scoring.before is not None:
        visible &= distance <= scoring.before
    if scoring.after is not None:
        visible &= distance >= -scoring.after
    return visible


@triton.jit
def drawn(dropout, place, head, queries, first_key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The numbers in [0, 1) that decide over the probabilities of a tile; four keys share a draw."""
    groups = first_key // 4 + tl.arange(0, BLOCK_N // 4)
    seed = tl.load(dropout.seed_ptr)
    return kernel_uniform(seed, groups[None, :], queries[:, None], head, place.segment, BLOCK_M, BLOCK_N)


@triton.jit
def online_softmax(s, m_i, l_i, scoring):
    """(p of the scores so far unseen, the factor for everything before, the new maximum and sum)."""
    m = tl.maximum(m_i, tl.max(s, axis=1))
    shift = tl.where(m == float("-inf"), 0.0, m * scoring.unit)  # a row that has seen nothing: -inf - -inf would be NaN
    p = power(s * scoring.unit - shift[:, None], scoring)
    before = power(m_i * scoring.unit - shift, scoring)
    return p, before, m, l_i * before + tl.sum(p, axis=1)


@triton.jit
def gradient_of_scores(product, dp, distance, seen, uniform, lse, delta, slope, scoring, dropout, MASKED: tl.constexpr):
    """(p as it met v, ds of the score, ds of the product but for scale), elementwise."""
    s, capped = score(product, distance, slope, scoring)
    p = power(s * scoring.unit - lse, scoring)
    if MASKED:
        p = tl.where(seen, p, 0.0)
    p_kept = p
    if dropout.seed_ptr is not None:
        kept = uniform >= dropout.p
        p_kept = tl.where(kept, p * dropout.factor, 0.0)
        dp = tl.where(kept, dp * dropout.factor, 0.0)
    ds = p * (dp - delta)
    if scoring.cap is None:
        return p_kept, ds, ds
    else:
        return p_kept, ds, ds * (1.0 - capped * capped)


# Forward


@triton.jit
def attend(
    acc, m_i, l_i, q, k, v, start, end, place, group_size, slope, scoring, dropout, PACKED: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Takes the keys from start to end into acc, m_i and l_i."""
    queries = place.block * BLOCK_M + tl.arange(0, BLOCK_M)
    positions = queries + place.k_length - place.q_length
    key_head = place.head // group_size
    for first in tl.range(start, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        k_tile = load_rows(
            k, place.batch, place.k_start, place.k_length, key_head, first, D, BLOCK_N, BLOCK_D, not MASKED, PACKED,
            DESCRIPTORS,
        )  # fmt: skip
        distance = positions[:, None] - keys[None, :]
        s, _ = score(tl.dot(q, tl.trans(k_tile), input_precision="ieee"), distance, slope, scoring)
        if MASKED:
            s = tl.where(sees(distance, scoring) & (keys < place.k_length)[None, :], s, float("-inf"))
        p, before, m_i, l_i = online_softmax(s, m_i, l_i, scoring)
        if dropout.seed_ptr is not None:
            p = tl.where(drawn(dropout, place, place.head, queries, first, BLOCK_M, BLOCK_N) >= dropout.p, p, 0.0)
        v_tile = load_rows(
            v, place.batch, place.k_start, place.k_length, key_head, first, D, BLOCK_N, BLOCK_D, not MASKED, PACKED,
            DESCRIPTORS,
        )  # fmt: skip
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * before[:, None], input_precision="ieee")
    return acc, m_i, l_i


@triton.jit
def forward_kernel(
    q,
    k,  # Heads, or a descriptor of (B, Hk, T, D), as v
    v,
    out,
    remainder,  # Heads of REMAINDER_SCALE * (the result - out), or None
    lse_ptr,  # (B, H, T) or (H, total)
    scoring,
    dropout,
    packing,
    grid,
    GROUP_SIZE: tl.constexpr,
    D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    PACKED: tl.constexpr = packing.tiles_ptr is not None
    place = place_of_program(grid, packing, False)
    if place.segment < 0:
        return
    first = place.block * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    q_tile = load_rows(
        q, place.batch, place.q_start, place.q_length, place.head, first, D, BLOCK_M, BLOCK_D, False, PACKED, False
    )
    slope = slope_of(scoring, place, place.head)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    if scoring.sinks_ptr is not None:  # a key without a value
        sink = tl.load(scoring.sinks_ptr + place.head).to(tl.float32)
        if PACKED:
            sink = tl.where(place.segment == packing.num_documents, float("-inf"), sink)
        m_i = in_units(sink, scoring) + l_i
        l_i += tl.where(sink == float("-inf"), 0.0, 1.0)

    shift = place.k_length - place.q_length
    last = tl.minimum(first + BLOCK_M, place.q_length) - 1
    start, whole_start, whole_end, end = visible_blocks(
        first + shift, last + shift, scoring.before, scoring.after, place.k_length, BLOCK_N
    )
    if scoring.before is not None:
        acc, m_i, l_i = attend(
            acc, m_i, l_i, q_tile, k, v, start, whole_start, place, GROUP_SIZE, slope, scoring, dropout, PACKED,
            D, BLOCK_M, BLOCK_N, BLOCK_D, True, DESCRIPTORS,
        )  # fmt: skip
    acc, m_i, l_i = attend(
        acc, m_i, l_i, q_tile, k, v, whole_start, whole_end, place, GROUP_SIZE, slope, scoring, dropout, PACKED,
        D, BLOCK_M, BLOCK_N, BLOCK_D, False, DESCRIPTORS,
    )  # fmt: skip
    acc, m_i, l_i = attend(
        acc, m_i, l_i, q_tile, k, v, whole_end, end, place, GROUP_SIZE, slope, scoring, dropout, PACKED,
        D, BLOCK_M, BLOCK_N, BLOCK_D, True, DESCRIPTORS,
    )  # fmt: skip

    empty = l_i == 0.0
    total = tl.where(empty, 1.0, l_i)
    acc *= (dropout.factor / total)[:, None] if dropout.seed_ptr is not None else (1.0 / total)[:, None]
    lse = (
        m_i * scoring.unit + tl.log(total)
        if scoring.natural is not None
        else (m_i * scoring.unit + tl.log2(total)) * LN2
    )
    lse = tl.where(empty, float("-inf"), lse)
    store_rows(out, acc, place.batch, place.q_start, place.q_length, place.head, first, D, BLOCK_M, BLOCK_D)
    if remainder is not None:
        lost = (acc - acc.to(out.ptr.dtype.element_ty).to(tl.float32)) * REMAINDER_SCALE
        store_rows(remainder, lost, place.batch, place.q_start, place.q_length, place.head, first, D, BLOCK_M, BLOCK_D)
    offsets = row_offsets(place, place.head, grid.num_heads, grid.T_q, rows)
    tl.store(lse_ptr + offsets, lse, mask=rows < place.q_length)


# Backward


@triton.jit
def delta_kernel(
    out,
    remainder,
    dout,
    dlse_ptr,  # (B, H, T) or (H, total) contiguous, or None; as lse and delta
    lse_ptr,
    delta_ptr,
    T,
    num_heads,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(T, BLOCK_M)
    pair, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_M
    batch, head = pair // num_heads, pair % num_heads
    o = load_rows(out, batch, 0 * first, T, head, first, D, BLOCK_M, BLOCK_D, False, False, False).to(tl.float32)
    if remainder is not None:
        lost = load_rows(remainder, batch, 0 * first, T, head, first, D, BLOCK_M, BLOCK_D, False, False, False)
        o += lost.to(tl.float32) / REMAINDER_SCALE
    do = load_rows(dout, batch, 0 * first, T, head, first, D, BLOCK_M, BLOCK_D, False, False, False)
    delta = tl.sum(o * do.to(tl.float32), axis=1)
    rows = first + tl.arange(0, BLOCK_M)
    offsets, mask = pair.to(tl.int64) * T + rows, rows < T
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + offsets, mask=mask, other=0.0)
    # A row that saw nothing has no gradient, whatever came back for it.
    delta = tl.where(tl.load(lse_ptr + offsets, mask=mask, other=0.0) == float("-inf"), 0.0, delta)
    tl.store(delta_ptr + offsets, delta, mask=mask)


@triton.jit
def load_lse_and_delta(
    lse_ptr, delta_ptr, place, head, num_heads, T_q, first, scoring, BLOCK_M: tl.constexpr, WHOLE: tl.constexpr
):
    """lse as it is subtracted from scores, +inf where there is nothing to see or no such row: then p is 0."""
    rows = first + tl.arange(0, BLOCK_M)
    offsets = row_offsets(place, head, num_heads, T_q, rows)
    if WHOLE:
        lse, delta = tl.load(lse_ptr + offsets), tl.load(delta_ptr + offsets)
    else:
        lse = tl.load(lse_ptr + offsets, mask=rows < place.q_length, other=float("inf"))
        delta = tl.load(delta_ptr + offsets, mask=rows < place.q_length, other=0.0)
    return tl.where(lse == float("-inf"), float("inf"), as_power(lse, scoring)), delta


@triton.jit
def add_dq(
    dq, dslope, q, do, lse, delta, k, v, start, end, place, group_size, slope, scoring, dropout,
    WANTS_DSLOPE: tl.constexpr, PACKED: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Adds to dq, and to the rows' slope gradients, what the keys from start to end give."""
    queries = place.block * BLOCK_M + tl.arange(0, BLOCK_M)
    positions = queries + place.k_length - place.q_length
    key_head = place.head // group_size
    for first in tl.range(start, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        k_tile = load_rows(
            k, place.batch, place.k_start, place.k_length, key_head, first, D, BLOCK_N, BLOCK_D, not MASKED, PACKED,
            DESCRIPTORS,
        )  # fmt: skip
        v_tile = load_rows(
            v, place.batch, place.k_start, place.k_length, key_head, first, D, BLOCK_N, BLOCK_D, not MASKED, PACKED,
            DESCRIPTORS,
        )  # fmt: skip
        product = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
        dp = tl.dot(do, tl.trans(v_tile), input_precision="ieee")
        distance = positions[:, None] - keys[None, :]
        seen = sees(distance, scoring) & (keys < place.k_length)[None, :]
        uniform = dp
        if dropout.seed_ptr is not None:
            uniform = drawn(dropout, place, place.head, queries, first, BLOCK_M, BLOCK_N)
        _, ds, dproduct = gradient_of_scores(
            product, dp, distance, seen, uniform, lse[:, None], delta[:, None], slope, scoring, dropout, MASKED
        )
        dq = tl.dot(dproduct.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
        if WANTS_DSLOPE:
            dslope -= tl.sum(ds * tl.abs(distance).to(tl.float32), axis=1)
    return dq, dslope


@triton.jit
def dq_kernel(
    q,
    k,  # Heads, or a descriptor of (B, Hk, T, D), as v
    v,
    dout,
    dq_heads,
    lse_ptr,  # (B, H, T) or (H, total), as the next two
    delta_ptr,
    dslopes_ptr,  # each row's share of the slope's gradient, or None
    scale,
    scoring,
    dropout,
    packing,
    grid,
    GROUP_SIZE: tl.constexpr,
    D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    PACKED: tl.constexpr = packing.tiles_ptr is not None
    place = place_of_program(grid, packing, False)
    if place.segment < 0:
        return
    first = place.block * BLOCK_M
    lse, delta = load_lse_and_delta(
        lse_ptr, delta_ptr, place, place.head, grid.num_heads, grid.T_q, first, scoring, BLOCK_M, False
    )
    q_tile = load_rows(
        q, place.batch, place.q_start, place.q_length, place.head, first, D, BLOCK_M, BLOCK_D, False, PACKED, False
    )
    do = load_rows(
        dout, place.batch, place.q_start, place.q_length, place.head, first, D, BLOCK_M, BLOCK_D, False, PACKED, False
    )
    slope = slope_of(scoring, place, place.head)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dslope = tl.zeros([BLOCK_M], tl.float32)
    WANTS_DSLOPE: tl.constexpr = dslopes_ptr is not None

    shift = place.k_length - place.q_length
    last = tl.minimum(first + BLOCK_M, place.q_length) - 1
    start, whole_start, whole_end, end = visible_blocks(
        first + shift, last + shift, scoring.before, scoring.after, place.k_length, BLOCK_N
    )
    if scoring.before is not None:
        dq, dslope = add_dq(
            dq, dslope, q_tile, do, lse, delta, k, v, start, whole_start, place, GROUP_SIZE, slope, scoring, dropout,
            WANTS_DSLOPE, PACKED, D, BLOCK_M, BLOCK_N, BLOCK_D, True, DESCRIPTORS,
        )  # fmt: skip
    dq, dslope = add_dq(
        dq, dslope, q_tile, do, lse, delta, k, v, whole_start, whole_end, place, GROUP_SIZE, slope, scoring, dropout,
        WANTS_DSLOPE, PACKED, D, BLOCK_M, BLOCK_N, BLOCK_D, False, DESCRIPTORS,
    )  # fmt: skip
    dq, dslope = add_dq(
        dq, dslope, q_tile, do, lse, delta, k, v, whole_end, end, place, GROUP_SIZE, slope, scoring, dropout,
        WANTS_DSLOPE, PACKED, D, BLOCK_M, BLOCK_N, BLOCK_D, True, DESCRIPTORS,
    )  # fmt: skip

    store_rows(dq_heads, dq * scale, place.batch, place.q_start, place.q_length, place.head, first, D, BLOCK_M, BLOCK_D)
    if dslopes_ptr is not None:
        rows = first + tl.arange(0, BLOCK_M)
        offsets = row_offsets(place, place.head, grid.num_heads, grid.T_q, rows)
        tl.store(dslopes_ptr + offsets, dslope, mask=rows < place.q_length)


@triton.jit
def add_dkdv(
    dk, dv, k, v, q, dout, lse_ptr, delta_ptr, start, end, place, scoring, dropout, grid,
    GROUP_SIZE: tl.constexpr, PACKED: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, MASKED: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Adds to dk and dv what the queries from start to end of all heads give. Scores are (keys, queries) here.

    One loop goes over the blocks of all heads of the group: nested, it would refill its pipeline for each, and spill.
    """
    keys = place.block * BLOCK_N + tl.arange(0, BLOCK_N)
    positions = keys - (place.k_length - place.q_length)
    blocks = tl.cdiv(end - start, BLOCK_M)
    for turn in tl.range(0, GROUP_SIZE * blocks):
        head, first = place.head * GROUP_SIZE, start + turn * BLOCK_M
        if GROUP_SIZE > 1:
            head, first = head + turn // blocks, start + turn % blocks * BLOCK_M
        slope = slope_of(scoring, place, head)
        queries = first + tl.arange(0, BLOCK_M)
        q_tile = load_rows(
            q, place.batch, place.q_start, place.q_length, head, first, D, BLOCK_M, BLOCK_D, not MASKED, PACKED,
            DESCRIPTORS,
        )  # fmt: skip
        do = load_rows(
            dout, place.batch, place.q_start, place.q_length, head, first, D, BLOCK_M, BLOCK_D, not MASKED, PACKED,
            DESCRIPTORS,
        )  # fmt: skip
        lse, delta = load_lse_and_delta(
            lse_ptr, delta_ptr, place, head, grid.num_heads * GROUP_SIZE, grid.T_q, first, scoring, BLOCK_M, not MASKED
        )
        if k.dtype == tl.float32:  # to the bit as in forward: else exp(s - lse) of a dominant key would not be 1
            product = tl.trans(tl.dot(q_tile, tl.trans(k), input_precision="ieee"))
        else:
            product = tl.dot(k, tl.trans(q_tile), input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        distance = queries[None, :] - positions[:, None]
        uniform = dp
        if dropout.seed_ptr is not None:
            uniform = tl.trans(drawn(dropout, place, head, queries, place.block * BLOCK_N, BLOCK_M, BLOCK_N))
        p, _, dproduct = gradient_of_scores(
            product, dp, distance, sees(distance, scoring), uniform, lse[None, :], delta[None, :], slope, scoring,
            dropout, MASKED,
        )  # fmt: skip
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dk = tl.dot(dproduct.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def dkdv_kernel(
    q,  # Heads, or a descriptor of (B, H, T, D), as dout
    k,
    v,
    dout,
    dk_heads,
    dv_heads,
    lse_ptr,  # (B, H, T) or (H, total)
    delta_ptr,
    scale,
    scoring,
    dropout,
    packing,
    grid,
    GROUP_SIZE: tl.constexpr,
    D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    PACKED: tl.constexpr = packing.tiles_ptr is not None
    place = place_of_program(grid, packing, True)
    if place.segment < 0:
        return
    first = place.block * BLOCK_N
    k_tile = load_rows(
        k, place.batch, place.k_start, place.k_length, place.head, first, D, BLOCK_N, BLOCK_D, False, PACKED, False
    )
    v_tile = load_rows(
        v, place.batch, place.k_start, place.k_length, place.head, first, D, BLOCK_N, BLOCK_D, False, PACKED, False
    )
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    shift = place.q_length - place.k_length
    last = tl.minimum(first + BLOCK_N, place.k_length) - 1
    # Seen from a key, its queries lie the other way.
    start, whole_start, whole_end, end = visible_blocks(
        first + shift, last + shift, scoring.after, scoring.before, place.q_length, BLOCK_M
    )
    if scoring.after is not None:
        dk, dv = add_dkdv(
            dk, dv, k_tile, v_tile, q, dout, lse_ptr, delta_ptr, start, whole_start, place, scoring, dropout, grid,
            GROUP_SIZE, PACKED, D, BLOCK_M, BLOCK_N, BLOCK_D, True, DESCRIPTORS,
        )  # fmt: skip
    dk, dv = add_dkdv(
        dk, dv, k_tile, v_tile, q, dout, lse_ptr, delta_ptr, whole_start, whole_end, place, scoring, dropout, grid,
        GROUP_SIZE, PACKED, D, BLOCK_M, BLOCK_N, BLOCK_D, False, DESCRIPTORS,
    )  # fmt: skip
    dk, dv = add_dkdv(
        dk, dv, k_tile, v_tile, q, dout, lse_ptr, delta_ptr, whole_end, end, place, scoring, dropout, grid,
        GROUP_SIZE, PACKED, D, BLOCK_M, BLOCK_N, BLOCK_D, True, DESCRIPTORS,
    )  # fmt: skip

    store_rows(dk_heads, dk * scale, place.batch, place.k_start, place.k_length, place.head, first, D, BLOCK_N, BLOCK_D)
    store_rows(dv_heads, dv, place.batch, place.k_start, place.k_length, place.head, first, D, BLOCK_N, BLOCK_D)


# Which (document, block) each program takes


@triton.jit
def work_of(
    document, cu_seqlens_q_ptr, cu_seqlens_k_ptr, num_documents, total_q, total_k, OVER_KEYS: tl.constexpr,
    GROWING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(blocks of a document, work): its block of rank c, from the lightest on, is work + (c + 1) * BLOCK if GROWING,
    else every block is work."""
    _, q_length = document_bounds(cu_seqlens_q_ptr, document, num_documents, total_q)
    _, k_length = document_bounds(cu_seqlens_k_ptr, document, num_documents, total_k)
    blocks = tl.cdiv(k_length if OVER_KEYS else q_length, BLOCK)
    if GROWING:
        seen = tl.where(document == num_documents, 0, k_length)
        return blocks, seen - (blocks * BLOCK if OVER_KEYS else q_length)
    else:
        return blocks, tl.where(document == num_documents, 0, q_length if OVER_KEYS else k_length)


@triton.jit
def schedule_kernel(
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    tiles_ptr,  # (num_tiles, 2), filled with -1
    num_tiles,
    num_documents,
    total_q,
    total_k,
    OVER_KEYS: tl.constexpr,
    GROWING: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK_DOCUMENTS: tl.constexpr,
):
    """A program per document writes its blocks behind all that are heavier, and those as heavy of documents before."""
    document = tl.program_id(0)
    blocks, work = work_of(
        document, cu_seqlens_q_ptr, cu_seqlens_k_ptr, num_documents, total_q, total_k, OVER_KEYS, GROWING, BLOCK
    )
    for first in range(0, blocks, BLOCK_RANKS):
        ranks = first + tl.arange(0, BLOCK_RANKS)
        slots = tl.zeros([BLOCK_RANKS], tl.int32)
        for start in range(0, num_documents + 1, BLOCK_DOCUMENTS):
            others = start + tl.arange(0, BLOCK_DOCUMENTS)
            other_blocks, other_work = work_of(
                others, cu_seqlens_q_ptr, cu_seqlens_k_ptr, num_documents, total_q, total_k, OVER_KEYS, GROWING, BLOCK
            )
            if GROWING:
                more = tl.maximum(work + (ranks[:, None] + 1) * BLOCK - other_work[None, :], 0)
                ahead = tl.maximum(other_blocks[None, :] - more // BLOCK, 0)
                as_heavy = (more > 0) & (more % BLOCK == 0) & (more // BLOCK <= other_blocks[None, :])
                ahead += tl.where(as_heavy & (others < document)[None, :], 1, 0)
            else:
                before = (other_work > work) | ((other_work == work) & (others < document))
                ahead = tl.where(before, other_blocks, 0)[None, :] + tl.where(others == document, 1, 0) * ranks[:, None]
            slots += tl.sum(ahead, axis=1)
        mask = (ranks < blocks) & (slots < num_tiles)  # boundaries that do not rise must not make it write elsewhere
        tl.store(tiles_ptr + 2 * slots, document + 0 * ranks, mask=mask)
        tl.store(tiles_ptr + 2 * slots + 1, blocks - 1 - ranks if OVER_KEYS else ranks, mask=mask)


@triton.jit
def document_sums_kernel(
    x_ptr,  # (H, total) float32
    sums_ptr,  # (documents, H)
    cu_seqlens_ptr,
    num_documents,
    total,
    H,
    BLOCK: tl.constexpr,
):
    """A program per document and head."""
    document, head = tl.program_id(0) // H, tl.program_id(0) % H
    start, length = document_bounds(cu_seqlens_ptr, document, num_documents, total)
    partial = tl.zeros([BLOCK], tl.float32)
    for first in range(0, length, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        partial += tl.load(x_ptr + head.to(tl.int64) * total + start + rows, mask=rows < length, other=0.0)
    tl.store(sums_ptr + document * H + head, tl.sum(partial, axis=0).to(sums_ptr.dtype.element_ty))
