"""What every Triton op shares: triton where it is installed, its interpreter, heads, and how many programs run."""

# mypy: disallow-untyped-defs=False
# (only the kernels have none: Triton gives their arguments types at each launch)

import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.ops import _torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the kernels stay plain functions, and are not called
    triton = SimpleNamespace(jit=lambda function=None, **options: function or (lambda kernel: kernel))
    tl = SimpleNamespace(constexpr=int)
    HAS_TRITON = False
else:
    HAS_TRITON = True

# Sizes that change from batch to batch, by the names that kernels give them. Triton would compile a kernel anew for 1,
# for a multiple of 16 and for any other number. In a tuple it always does, so kernels take these sizes one by one.
DYNAMIC_SIZES = [
    *("B", "N", "P", "T", "T_q", "T_k", "total", "total_q", "total_k", "num_seqs", "num_tiles"),
    *("num_blocks", "num_bh", "swizzle_group"),  # of attention's TileScheduler
    *("mask_size_0", "mask_size_1", "mask_size_2"),
]
# Kernels can only be interpreted if the knob was on when they were imported.
CAN_INTERPRET = HAS_TRITON and triton.knobs.runtime.interpret
# The interpreter counts as a device this small: loops over rows then take more than one iteration in a test.
INTERPRETED_SMS = 2
WARPS_PER_SM = 16  # of a kernel that sums over rows: each of its programs leaves partial sums to add up
MAX_BLOCKS_PER_PROGRAM = 64  # of rows, in such a kernel: the error of a program's float32 sum grows with them


@triton.jit
def multiple_of_16(size):
    """A dynamic size that is one, so that the compiler knows it: Triton's own hint has no effect on arguments."""
    return size // 16 * 16


class Heads(NamedTuple):
    """A tensor (B, T, H, D), or (total, H, D) as if B were 1, whose features are contiguous."""

    ptr: Any
    stride_batch: Any
    stride_token: Any
    stride_head: Any


def heads_of(x: Tensor) -> Heads:
    *outer, stride_token, stride_head, _ = x.stride()
    return Heads(x, outer[0] if outer else 0, stride_token, stride_head)


@_torch.assume_constant_result
def interprets() -> bool:
    """Triton's knob; torch.compile cannot follow the environment lookup behind it, so it takes the answer as it is."""
    return triton.knobs.runtime.interpret


@functools.cache
def num_sms(device: torch.device) -> int:
    """How many streaming multiprocessors the device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return INTERPRETED_SMS


# Triton's own are functions of its language too, and cost the host many times as much.


def cdiv(x: int, y: int) -> int:
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def num_row_programs(row_blocks: int, col_blocks: int, num_warps: int, num_sms: int) -> int:
    """How many programs sum over the row blocks of each column block: as many as run at once, or a multiple of that."""
    at_once = cdiv(num_sms * (WARPS_PER_SM // num_warps), col_blocks)
    return min(row_blocks, at_once * cdiv(row_blocks, at_once * MAX_BLOCKS_PER_PROGRAM))
