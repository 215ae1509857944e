"""What every Triton op shares: triton where it is installed, and the rule that says which tensors its kernels take."""

import contextlib
import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the decorated kernels stay plain functions that nobody calls
    triton = SimpleNamespace(jit=lambda function: function)
    tl = SimpleNamespace(constexpr=int)
    HAS_TRITON = False
else:
    HAS_TRITON = True

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of the tensors that kernels take; they compute in float32
# Kernels can only be interpreted if the knob was on when they were imported; elsewhere nobody need look at it again.
CAN_INTERPRET = HAS_TRITON and triton.knobs.runtime.interpret
# The kernels see a CPU, which only the interpreter runs them on, as a device this small: loops over rows then have more
# than one turn at the sizes of a test.
INTERPRETED_SMS = 2
MOST_TURNS = 64  # of a program that sums over rows: the error of its float32 sum grows with them


def is_exporting() -> bool:
    """Whether torch.export is tracing: the program it makes then holds PyTorch's own ops instead of ours.

    It knows no autograd.Function, so gradients of ours would be lost without an error, and the size from which our code
    is faster would become a constraint on the sizes that the program takes.
    """
    return torch.compiler._is_exporting_flag  # is_exporting() itself is always true in what torch.compile 2.11 traces


def runs_kernels(tensor: Tensor) -> bool:
    """Whether an op given this tensor runs its Triton kernels: a CUDA tensor, or a CPU tensor under TRITON_INTERPRET=1.

    The knob is read at every call, so a program that had it on at first can turn it off and on again.
    """
    if is_exporting():
        return False
    if tensor.is_cuda:
        return HAS_TRITON
    return CAN_INTERPRET and tensor.is_cpu and interprets()


@torch.compiler.assume_constant_result
def interprets() -> bool:
    """Triton's knob; torch.compile cannot follow the environment lookup behind it, so it takes the answer as it is."""
    return triton.knobs.runtime.interpret


def is_ordinary(*tensors: Tensor | None) -> bool:
    """Only strided tensors, and no transform at work: an autograd.Function over kernels knows no others.

    Not: a subclass, a nested or an MKL-DNN tensor, torch.func, forward mode, a gradient of many rows at once.
    """
    if torch.compiler.is_compiling():
        return not (is_exporting() or is_transformed())
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_nested
        ):
            return False
    return not is_transformed()


@torch.compiler.assume_constant_result
def is_transformed() -> bool:
    """Whether torch.func or forward mode is at work: torch.compile enters both as it traces, and guards them itself."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_autocast(tensor: Tensor) -> bool:
    """Whether autocast is on where the tensor is. A meta tensor's device has no autocast, and PyTorch raises there.

    torch.amp.is_autocast_available would say so, but torch.compile of PyTorch 2.11 cannot trace it.
    """
    kind = tensor.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def is_one_of(size: int, *sizes: int) -> bool:
    """Whether a size equals one of these; `in` does not say so of a symbolic size, as torch.compile has them."""
    return any(size == other for other in sizes)


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
