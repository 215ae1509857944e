"""What every Triton op shares: triton where it is installed, its interpreter, and how programs are shared out."""

import contextlib
import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the decorated kernels stay plain functions that nobody calls
    triton = SimpleNamespace(jit=lambda function: function)
    tl = SimpleNamespace(constexpr=int)
    HAS_TRITON = False
else:
    HAS_TRITON = True

# Kernels can only be interpreted if the knob was on when they were imported; elsewhere nobody need look at it again.
CAN_INTERPRET = HAS_TRITON and triton.knobs.runtime.interpret
# The kernels see a CPU, which only the interpreter runs them on, as a device this small: loops over rows then have more
# than one turn at the sizes of a test.
INTERPRETED_SMS = 2
MOST_TURNS = 64  # of a program that sums over rows: the error of its float32 sum grows with them


@torch.compiler.assume_constant_result
def interprets() -> bool:
    """Triton's knob; torch.compile cannot follow the environment lookup behind it, so it takes the answer as it is."""
    return triton.knobs.runtime.interpret


@functools.cache
def num_sms(device: torch.device) -> int:
    """How many programs the device runs side by side at least."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return INTERPRETED_SMS


def launch_on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's device current: Triton launches on the current one, and would fault on another's pointers."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def num_summing_programs(blocks: int, at_once: int) -> int:
    """How many programs share these blocks of rows and sum over them: as many as run at once, or a multiple of that."""
    return min(blocks, at_once * triton.cdiv(blocks, at_once * MOST_TURNS))
