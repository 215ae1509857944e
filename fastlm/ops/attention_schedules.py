"""Lists of which block of which sequence each program of a varlen kernel takes, made on the device; and their reuse."""

from typing import Any

import torch

from fastlm.ops._launch import launch
from fastlm.ops.attention_reference import Inputs, Options
from fastlm.ops.attention_triton import Varlen, schedule_kernel


def varlen_tiles(inputs: Inputs, options: Options, block: int, over_keys: bool) -> Varlen:
    """The list of tiles of varlen sequences; it is never more than one per sequence too long."""
    cu_q, cu_k = (bounds.contiguous() for bounds in inputs.bounds)
    num_seqs, total_q, total_k = inputs.num_sequences, len(inputs.q), len(inputs.k)
    num_tiles = (total_k if over_keys else total_q) // block + num_seqs + 1
    tiles = torch.full((num_tiles, 2), -1, dtype=torch.int32, device=inputs.q.device)
    launch(
        schedule_kernel,
        num_seqs + 1,
        cu_q,
        cu_k,
        tiles,
        num_tiles,
        num_seqs,
        total_q,
        total_k,
        OVER_KEYS=over_keys,
        GROWING=is_growing(options),
        BLOCK=block,
        BLOCK_RANKS=16,
        BLOCK_SEQS=64,
    )
    return Varlen(cu_q, cu_k, tiles)


def is_growing(options: Options) -> bool:
    """Whether a window on the right alone bounds the scores, as causality does: a sequence's blocks differ in work."""
    return options.window_right is not None and options.window_left is None


class AttentionSchedules:
    """The lists of tiles of one varlen batch, kept from call to call of attention.

        schedules = AttentionSchedules()  # a new one for each batch
        for layer in model.layers:
            x = layer(x, cu_seqlens, schedules)  # attention(q, k, v, cu_seqlens_q=cu_seqlens, schedules=schedules)

    On a GPU each call lists its tiles for forward, for dk and dv, and for dq, unless an earlier call that was given the
    same object had the same boundaries, blocks and stream. The calls may differ in anything, their cu_seqlens included.

    Nothing may write to cu_seqlens between the calls: with the tiles of other sequences rows of the results would stay
    unwritten. So make one for each batch, and in a CUDA graph inside of its capture. Under torch.compile, a profiler or
    a dispatch mode, as selective checkpointing has, ops take tensors alone: each call there lists its tiles.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Varlen] = {}

    def varlen_tiles(self, inputs: Inputs, options: Options, block: int, over_keys: bool) -> Varlen:
        """Those of the function, or of an earlier call."""
        q, k = inputs.q, inputs.k
        cu_q, cu_k = (bounds.contiguous() for bounds in inputs.bounds)
        inputs = inputs._replace(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
        sizes = inputs.num_sequences, len(q), len(k)
        stream = torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else None  # another's may not be done yet
        # By address: checkpointing's backward has the same memory in another tensor. Varlen keeps it from being freed.
        boundaries = cu_q.data_ptr(), cu_q.dtype, cu_k.data_ptr(), cu_k.dtype
        key = *boundaries, *sizes, block, over_keys, is_growing(options), stream
        if key not in self._kept:
            self._kept[key] = varlen_tiles(inputs, options, block, over_keys)
        return self._kept[key]
