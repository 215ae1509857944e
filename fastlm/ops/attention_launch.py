"""Launches the Triton kernels of attention_triton.py: their tiles, programs and arguments."""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.ops._device import capability
from fastlm.ops._dropout import Dropout, kept_factor
from fastlm.ops._launch import launch, launch_on
from fastlm.ops._triton import HAS_TRITON, Heads, cdiv, heads_of, next_power_of_2
from fastlm.ops.attention_reference import Inputs, Options
from fastlm.ops.attention_schedules import AttentionSchedules, varlen_tiles
from fastlm.ops.attention_triton import (
    Scoring,
    TileScheduler,
    Varlen,
    delta_kernel,
    dkdv_kernel,
    dq_kernel,
    forward_kernel,
    sequence_sums_kernel,
)

if HAS_TRITON:
    from triton.runtime.driver import driver
    from triton.tools.tensor_descriptor import TensorDescriptor

    class CheckedDescriptor(TensorDescriptor):
        """Of what can_use_tma has checked: Triton's own checks cost the host as much as all else."""

        def __post_init__(self) -> None:
            pass


# Tiles


class Tile(NamedTuple):
    """Queries and keys of one step of the inner loop, warps, and pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


INTERPRETED = 0  # stands for the architecture of a CPU that interprets the kernels
TILE_OF_INTERPRETER = Tile(32, 16, 4, 1)  # small, so that the sizes of a test make several blocks
DELTA_BLOCK_NUMEL = 4096  # with twice as many, 128 and more features spilled on sm_80
L2_BYTES = 16 * 2**20  # well under the cache of an A100 (40 MB, in two halves) or of an H100 (50 MB)


# By architecture, direction and BLOCK_D; 16 and 32 take the tile of 32, or else of 64. None of these spills.
# float32 must not become tf32, so it uses no tensor cores, and one set of tiles fits every architecture.
TILES: dict[tuple[int | str, str], dict[int, Tile]] = {
    ("float32", "forward"): {
        32: Tile(64, 32, 8, 2),
        64: Tile(64, 32, 8, 1),
        128: Tile(32, 16, 8, 2),
        256: Tile(16, 16, 8, 2),
    },
    ("float32", "dkdv"): {
        32: Tile(32, 64, 8, 1),
        64: Tile(32, 32, 8, 1),
        128: Tile(16, 32, 8, 2),
        256: Tile(16, 16, 8, 2),
    },
    ("float32", "dq"): {64: Tile(64, 16, 8, 1), 128: Tile(32, 32, 8, 2), 256: Tile(16, 16, 8, 2)},
    (80, "forward"): {
        32: Tile(64, 64, 4, 3),
        64: Tile(128, 64, 8, 3),
        128: Tile(128, 32, 8, 3),
        256: Tile(64, 32, 8, 2),
    },
    (80, "dkdv"): {64: Tile(32, 64, 8, 2), 128: Tile(32, 64, 8, 2), 256: Tile(16, 64, 8, 2)},
    (80, "dq"): {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 1)},
    (90, "forward"): {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 2)},
    (90, "dkdv"): {64: Tile(64, 128, 8, 2), 128: Tile(32, 128, 8, 2), 256: Tile(32, 32, 8, 2)},
    (90, "dq"): {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
    (100, "forward"): {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 2)},
    (100, "dkdv"): {64: Tile(64, 64, 8, 2), 128: Tile(64, 64, 4, 2), 256: Tile(32, 64, 8, 2)},
    (100, "dq"): {32: Tile(128, 32, 8, 2), 64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
}


# Exceptions: without TMA, where addresses take registers; where it loads all, and no block need be masked but for the
# diagonal, so that there are registers to spare; and with a score mod, which takes more of them.
TILES_NO_TMA: dict[tuple[int | str, str], dict[int, Tile]] = {(90, "dkdv"): {128: Tile(32, 64, 8, 2)}}
TILES_ENDS_IN_FULL: dict[tuple[int | str, str], dict[int, Tile]] = {(90, "dkdv"): {128: Tile(64, 128, 8, 2)}}
TILES_SCORE_MOD: dict[tuple[int | str, str], dict[int, Tile]] = {
    ("float32", "forward"): {64: Tile(32, 16, 8, 1)},
    ("float32", "dkdv"): {32: Tile(32, 32, 8, 1)},
    (80, "forward"): {32: Tile(128, 64, 8, 3), 64: Tile(128, 32, 8, 3), 256: Tile(32, 32, 8, 2)},
    (80, "dkdv"): {64: Tile(32, 64, 8, 1), 256: Tile(16, 32, 8, 2)},
    (80, "dq"): {
        32: Tile(128, 32, 8, 1),
        64: Tile(128, 32, 8, 2),
        128: Tile(64, 64, 8, 2),
        256: Tile(64, 16, 8, 1),
    },
    (90, "forward"): {256: Tile(64, 16, 8, 2)},
    (90, "dkdv"): {64: Tile(32, 128, 8, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 16, 8, 1)},
    (90, "dq"): {32: Tile(128, 64, 8, 2), 64: Tile(128, 32, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(32, 32, 8, 2)},
    (100, "forward"): {64: Tile(64, 32, 4, 3), 256: Tile(64, 32, 8, 1)},
    (100, "dkdv"): {32: Tile(32, 64, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(16, 64, 8, 2)},
    (100, "dq"): {128: Tile(128, 32, 8, 2)},
}


@functools.cache
def choose_tile(
    direction: str, D: int, itemsize: int, arch: int, use_tma: bool, ends_in_full: bool, score_mod: bool
) -> Tile:
    """The tile of "forward", "dq" or "dkdv" for heads of D features, on sm_`arch`.

    ends_in_full  whether TMA loads dense tensors, and no window is on the left: see dkdv_kernel
    score_mod     as in has_score_mod

    Like every unknown chip sm_120 takes the tiles of sm_80, whose tensor cores it has. They fit into 99 KiB of shared
    memory, which a block has on sm_86, sm_89 and sm_120.
    Causal and full attention take the same tile until a measurement tells them apart.
    """
    if arch == INTERPRETED:
        return TILE_OF_INTERPRETER
    kind: int | str = "float32" if itemsize == 4 else 90 if 90 <= arch < 100 else 100 if 100 <= arch < 120 else 80
    sizes = (32, 64) if D <= 32 else (max(64, block_of_features(D)),)
    tables = (
        TILES_SCORE_MOD if score_mod else {},
        TILES_ENDS_IN_FULL if ends_in_full else {},
        {} if use_tma else TILES_NO_TMA,
        TILES,
    )
    rows = [table.get((kind, direction), {}) for table in tables]
    return next(row[size] for row in rows for size in sizes if size in row)


def architecture(x: Tensor) -> int:
    """80 for sm_80 and so on; for meta tensors, the architecture that the active driver compiles for."""
    if x.is_cuda:
        return capability(x.device)
    return INTERPRETED if x.device.type == "cpu" else driver.active.get_current_target().arch


def block_of_features(D: int) -> int:
    return max(16, next_power_of_2(D))


# Launchers


def has_score_mod(inputs: Inputs, options: Options) -> bool:
    """Whether scores have a softcap or ALiBi, or probabilities dropout; windows and sinks are no score mods."""
    return bool(options.softcap) or inputs.alibi_slopes is not None or inputs.seed is not None


def scoring_of(inputs: Inputs, options: Options) -> Scoring:
    scale, use_exp, slopes = options.softcap or options.scale, inputs.q.dtype == torch.float32, inputs.alibi_slopes
    if slopes is not None:
        slopes = slopes.contiguous().expand(inputs.num_sequences, slopes.shape[-1])
    return Scoring(
        scale_log2=1.0 if use_exp else scale / math.log(2),
        scale_exp=scale if use_exp else None,
        scale_tanh=options.scale / options.softcap if options.softcap else None,
        window_left=options.window_left,
        window_right=options.window_right,
        slopes_ptr=slopes,
        stride_slopes=0 if slopes is None else slopes.stride(0),
        sinks_ptr=None if inputs.sinks is None else inputs.sinks.contiguous(),
    )


def dropout_of(inputs: Inputs, options: Options) -> Dropout:
    return Dropout(inputs.seed, options.dropout_p, kept_factor(options.dropout_p))


def schedule(
    inputs: Inputs, options: Options, tile: Tile, over_keys: bool, schedules: AttentionSchedules | None
) -> tuple[Varlen, TileScheduler]:
    """The programs of a kernel: one for each block of queries or keys, and head of these."""
    q, k = inputs.q, inputs.k
    T_q, T_k, num_heads = q.shape[-3], k.shape[-3], (k if over_keys else q).shape[-2]
    block, T = (tile.block_n, T_k) if over_keys else (tile.block_m, T_q)
    varlen, num_blocks = Varlen(None, None, None), cdiv(T, block)
    if inputs.cu_seqlens_q is not None:
        list_tiles = varlen_tiles if schedules is None else schedules.varlen_tiles
        varlen = list_tiles(inputs, options, block, over_keys)
        num_blocks = len(varlen.tiles_ptr)
    num_bh, num_seqs = inputs.batch * num_heads, inputs.num_sequences
    group = swizzle_group(inputs, over_keys, num_bh)
    return varlen, TileScheduler(num_blocks, num_bh, group, num_heads, num_seqs, T_q, T_k)


def swizzle_group(inputs: Inputs, over_keys: bool, num_bh: int) -> int:
    """How many batch-head pairs are scheduled together: as many as read from the L2 cache what one of them loaded."""
    q, k = inputs.q, inputs.k
    group_size = q.shape[-2] // k.shape[-2]
    T_read = (q if over_keys else k).shape[-3]
    bytes_per_head = max(1, 2 * T_read * q.shape[-1] * q.element_size())  # there may be no keys
    if over_keys:  # a key head reads all query heads of its group
        return min(num_bh, max(L2_BYTES // (bytes_per_head * group_size), 1))
    return min(num_bh, max(L2_BYTES * group_size // bytes_per_head // group_size * group_size, group_size))


def tma_descriptor(x: Tensor, block: int, block_d: int) -> Any:
    """Of (B, H, T, D), so that a block is one head's."""
    *batch, T, H, D = x.shape
    *outer, stride_token, stride_head, _ = x.stride()
    B = batch[0] if batch else 1
    stride_batch = stride_head if B == 1 else outer[0]  # of no effect for one, but must be a multiple of 16 bytes
    return CheckedDescriptor(x, [B, H, T, D], [stride_batch, stride_head, stride_token, 1], [1, 1, block, block_d])


def rows_descriptor(x: Tensor, block: int) -> Any:
    """Of (B * H, T), from shift or delta (B, H, T), whose rows are padded."""
    T = x.shape[-1]  # strides by padded: of a single row PyTorch may give any
    return CheckedDescriptor(x, [x.shape[:-1].numel(), T], [padded(T), 1], [1, block])


def can_use_tma(arch: int, *tensors: Tensor) -> bool:
    """Whether TMA pays on the chip, and these tensors are aligned as TMA requires.

    sm_120 has TMA, but its tensor cores read registers: with descriptors every tile spilled that does not without.
    """
    if not 90 <= arch < 120:
        return False
    for x in tensors:
        if not x.numel() or x.data_ptr() % 16:
            return False
        elements = 16 // x.element_size()
        for stride in x.stride()[:-1]:
            if stride <= 0 or stride % elements:
                return False
    return True


def configure(
    inputs: Inputs, options: Options, direction: str, *streamed: Tensor
) -> tuple[Tile, list[Any], dict[str, Any]]:
    """(tile, arguments for the tensors that the inner loop streams, constexprs and launch options)."""
    q, D, arch = inputs.q, inputs.q.shape[-1], architecture(inputs.q)
    use_tma = can_use_tma(arch, *streamed)
    ends_in_full = use_tma and inputs.cu_seqlens_q is None and options.window_left is None
    tile = choose_tile(direction, D, q.element_size(), arch, use_tma, ends_in_full, has_score_mod(inputs, options))
    block, block_d = tile.block_m if direction == "dkdv" else tile.block_n, block_of_features(D)
    operands = [tma_descriptor(x, block, block_d) if use_tma else heads_of(x) for x in streamed]
    constants = {
        "GROUP_SIZE": q.shape[-2] // inputs.k.shape[-2],
        "D": D,
        "USE_TMA": use_tma,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": block_d,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    return tile, operands, constants


def forward(
    inputs: Inputs, options: Options, schedules: AttentionSchedules | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(out like q, lse float32 (B, H, T) or (H, total), remainder). The scale or the softcap is positive."""
    q, k, v = inputs[:3]
    out, lse = forward_outputs(q)
    remainder = empty_remainder(q, inputs.seed)
    if not q.numel():
        return out, lse.fill_(-math.inf), remainder
    tile, streamed, constants = configure(inputs, options, "forward", k, v)
    with launch_on(q):
        varlen, scheduler = schedule(inputs, options, tile, False, schedules)
        launch(
            forward_kernel,
            scheduler.num_blocks * scheduler.num_bh,
            heads_of(q),
            *streamed,
            heads_of(out),
            heads_or_none(remainder),
            lse,
            scoring_of(inputs, options),
            dropout_of(inputs, options),
            varlen,
            *scheduler,
            **constants,
        )
    return out, lse, remainder


def forward_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse), uninitialised."""
    *batch, T, H, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((*batch, H, T), dtype=dtype)


def empty_remainder(q: Tensor, seed: Tensor | None) -> Tensor:
    """What rounding to 16 bits takes from out, uninitialised; without elements where delta does not need it.

    Without dropout a row that sees one key is that key's value, and nothing is lost. With dropout it is the value over
    1 - dropout_p: delta from out alone would be off by one rounding of out, where the true ds is 0. To sum p * dp
    instead would take the products q . k and do . v, and the draws, a third time. This takes 2 bytes an element.
    """
    return q.new_empty(q.shape if seed is not None and q.element_size() == 2 else (0,))


def heads_or_none(x: Tensor) -> Heads | None:
    return heads_of(x) if x.dim() > 1 else None


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    remainder: Tensor,
    inputs: Inputs,
    options: Options,
    schedules: AttentionSchedules | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dq, dk, dv, dslopes, dsinks); None for absent slopes or sinks."""
    q, k, v = inputs[:3]
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if q.numel() and k.numel():
        with launch_on(q):
            shift, delta = compute_shift_and_delta(inputs, dout, dlse, out, lse, remainder)
            shared = scoring_of(inputs, options), dropout_of(inputs, options), schedules
            launch_dkdv(inputs, options, dout, shift, delta, dk, dv, *shared)
            dslopes = launch_dq(inputs, options, dout, shift, delta, dq, *shared)
    else:  # out is 0, and lse the sink
        delta = torch.zeros_like(lse) if dlse is None else -dlse
        dslopes = None if inputs.alibi_slopes is None else torch.zeros_like(inputs.alibi_slopes)
        dq, dk, dv = dq.zero_(), dk.zero_(), dv.zero_()
    return dq, dk, dv, dslopes, None if inputs.sinks is None else sink_gradient(inputs.sinks, lse, delta)


def padded(T: int) -> int:
    """Elements from one row of shift and delta to the next: TMA and wide loads ask for a multiple of 16 bytes."""
    return -(-T // 16) * 16


def compute_shift_and_delta(
    inputs: Inputs, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, remainder: Tensor
) -> tuple[Tensor, Tensor]:
    """What is subtracted from each row's exponents and from its dp: (B, H, T) or (H, total), in padded rows."""
    T, H, D = out.shape[-3:]
    shift, delta = lse.new_empty((2, *lse.shape[:-1], padded(T)))[..., :T]
    BLOCK_D = block_of_features(D)
    BLOCK_M = min(64, DELTA_BLOCK_NUMEL // BLOCK_D)
    launch(
        delta_kernel,
        cdiv(T, BLOCK_M) * inputs.batch * H,  # in one dimension: y and z end at 65,535
        heads_of(out),
        heads_or_none(remainder),
        heads_of(dout),
        None if dlse is None else dlse.contiguous(),
        lse,
        shift,
        delta,
        T,
        H,
        D=D,
        BLOCK_M=BLOCK_M,
        BLOCK_D=BLOCK_D,
    )
    return shift, delta


def launch_dkdv(
    inputs: Inputs,
    options: Options,
    dout: Tensor,
    shift: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    scoring: Scoring,
    dropout: Dropout,
    schedules: AttentionSchedules | None,
) -> None:
    tile, streamed, constants = configure(inputs, options, "dkdv", inputs.q, dout)
    varlen, scheduler = schedule(inputs, options, tile, True, schedules)
    by_tma = constants["USE_TMA"] and varlen.tiles_ptr is None  # a sequence need not begin at a multiple of 16 bytes
    rows = [rows_descriptor(x, tile.block_m) if by_tma else x for x in (shift, delta)]
    launch(
        dkdv_kernel,
        scheduler.num_blocks * scheduler.num_bh,
        streamed[0],
        heads_of(inputs.k),
        heads_of(inputs.v),
        streamed[1],
        heads_of(dk),
        heads_of(dv),
        *rows,
        options.scale,
        scoring,
        dropout,
        varlen,
        *scheduler,
        **constants,
    )


def launch_dq(
    inputs: Inputs,
    options: Options,
    dout: Tensor,
    shift: Tensor,
    delta: Tensor,
    dq: Tensor,
    scoring: Scoring,
    dropout: Dropout,
    schedules: AttentionSchedules | None,
) -> Tensor | None:
    """Fills dq and returns the gradient of the slopes."""
    tile, streamed, constants = configure(inputs, options, "dq", inputs.k, inputs.v)
    dslope_partial = None if inputs.alibi_slopes is None else delta.new_empty(delta.shape)
    varlen, scheduler = schedule(inputs, options, tile, False, schedules)
    launch(
        dq_kernel,
        scheduler.num_blocks * scheduler.num_bh,
        heads_of(inputs.q),
        *streamed,
        heads_of(dout),
        heads_of(dq),
        shift,
        delta,
        dslope_partial,
        options.scale,
        scoring,
        dropout,
        varlen,
        *scheduler,
        **constants,
    )
    return None if dslope_partial is None else slope_gradient(inputs, dslope_partial, varlen)


def slope_gradient(inputs: Inputs, dslope_partial: Tensor, varlen: Varlen) -> Tensor:
    """The rows' parts (B, H, T) or (H, total), summed for each slope."""
    slopes = inputs.alibi_slopes
    assert slopes is not None, "only a call with slopes has their gradient"
    if inputs.cu_seqlens_q is None or slopes.dim() == 1:
        return dslope_partial.sum(-1).sum_to_size(slopes.shape).to(slopes.dtype)
    dslopes = torch.empty_like(slopes)
    H, total = dslope_partial.shape
    launch(
        sequence_sums_kernel,
        slopes.numel(),
        dslope_partial,
        dslopes,
        varlen.cu_seqlens_q_ptr,
        inputs.num_sequences,
        total,
        H,
        BLOCK=1024,
    )
    return dslopes


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """-p_sink * delta, summed over the rows of each head."""
    p = torch.exp(sinks.to(lse.dtype)[:, None] - lse)  # (B, H, T) or (H, total)
    gradient = (-p * delta).masked_fill(lse == -math.inf, 0.0)  # no gradient where no key was seen
    return gradient.sum(-1).sum_to_size(sinks.shape).to(sinks.dtype)
