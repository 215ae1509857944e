"""On a CPU, keeps the memory that a step frees for the next one instead of giving it back to the system.

glibc gets each large tensor from the system and gives it back when it is freed, so that every step waits until the
system has cleared the pages of all its gradients and large activations anew. This is of the main thread's heap, the
only one that can grow as far as large tensors need. Source: man 3 mallopt.
"""

import contextlib
import ctypes
import dataclasses
from collections.abc import Iterator

import torch

from fastlm.train.knobs import Knobs

# Parameters of mallopt, and what they are unless set. Large tensors come from the heap, and none of it is given back.
_M_MMAP_MAX, _MMAP_MAX = -4, 65536
_M_TRIM_THRESHOLD, _TRIM_THRESHOLD = -1, 128 * 1024


@dataclasses.dataclass
class KeptMemoryKnobs(Knobs):
    """What becomes of the memory that a step frees."""

    heading = "memory between steps"

    keep_memory: bool = True
    """On a CPU with glibc, keep what a step frees for the next one; else the system clears it anew in each step."""


@contextlib.contextmanager
def kept_memory(device: torch.device, wanted: bool = True) -> Iterator[None]:
    """Within it glibc keeps freed memory, if the tensors are on a CPU; with another C library nothing changes."""
    libc = _glibc() if wanted and device.type == "cpu" else None
    if libc is None:
        yield
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_MAX, _MMAP_MAX)
        libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    with contextlib.suppress(OSError, TypeError):  # TypeError: Windows
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            return libc
    return None
