"""Which architecture a GPU has, and which of them the kernels are made for."""

import functools
import sys

import torch
from torch import Tensor

from fastlm.ops import _torch

OLDEST = 75  # sm_75, of a T4: the compiled library holds no images for older GPUs, and CUDA 13 makes none
OLDEST_WITH_DOT = 80  # Triton multiplies matrices on FMA units before sm_80 (its PR 5066), and those kernels spill


def is_older(tensor: Tensor, architecture: int) -> bool:
    """Whether the tensor is on a GPU older than sm_`architecture`."""
    return tensor.is_cuda and capability(tensor.device) < architecture


@_torch.assume_constant_result
def capability(device: torch.device) -> int:
    """80 for sm_80 and so on."""
    return found_capability(device)


@functools.cache
def found_capability(device: torch.device) -> int:
    """As capability. Tensors of a GPU that is not there are fake: what is traced with them is for a GPU of any age."""
    if not torch.cuda.is_available():
        return sys.maxsize
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
