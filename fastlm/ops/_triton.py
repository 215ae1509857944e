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

# The kernels see a CPU, which only the interpreter runs them on, as a device this small: loops over rows then have more
# than one turn at the sizes of a test.
INTERPRETED_SMS = 2


def runs_kernels(tensor: Tensor) -> bool:
    """Whether an op given this tensor runs its Triton kernels: a CUDA tensor, or a CPU tensor under TRITON_INTERPRET=1.

    The knob is read at every call, so a program can turn it on and off; kernels can only be interpreted if it was also
    on when they were imported.
    """
    if tensor.is_cuda:
        return HAS_TRITON
    return HAS_TRITON and tensor.device.type == "cpu" and interprets()


@torch.compiler.assume_constant_result
def interprets() -> bool:
    """Triton's knob; torch.compile cannot follow the environment lookup behind it, so it takes the answer as it is."""
    return triton.knobs.runtime.interpret


def is_ordinary(tensor: Tensor) -> bool:
    """No subclass, no torch.func or forward-mode transform: an autograd.Function over kernels knows none of these."""
    return torch.compiler.is_compiling() or (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


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
