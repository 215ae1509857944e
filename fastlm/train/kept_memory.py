"""On a CPU, keeps the memory that a step frees for the next one instead of giving it back to the system.

glibc gets each large tensor from the system and gives it back when it is freed, so that every step waits until the
system has cleared the pages of all its gradients and large activations anew. This is of the main thread's heap, the
only one that can grow as far as large tensors need. Source: man 3 mallopt.
"""

import contextlib
import ctypes
import dataclasses
import threading
from collections.abc import Iterator

import torch

from fastlm.train.knobs import Knobs

# Parameters of mallopt: (number, within, afterwards). Large tensors come from the heap, and none of it is given back.
# Once a parameter was set glibc adapts none to what is freed, so what is left are the sizes that it adapts them to:
# with those it begins with, every tensor of more than 128 KiB would be the system's to clear from then on.
_MMAP_MAX = (-4, 0, 65536)
_MMAP_THRESHOLD = (-3, 32 << 20, 32 << 20)
_TRIM_THRESHOLD = (-1, -1, 64 << 20)


@dataclasses.dataclass
class KeptMemoryKnobs(Knobs):
    """What becomes of the memory that a step frees."""

    heading = "memory between steps"

    keep_memory: bool = True
    """On a CPU with glibc, keep what a step frees for the next one; else the system clears it anew in each step."""


_lock = threading.Lock()
_users = 0  # of the one heap of this process: it is kept for the first until the last is done


@contextlib.contextmanager
def kept_memory(device: torch.device, wanted: bool = True) -> Iterator[None]:
    """Within it glibc keeps freed memory, if the tensors are on a CPU; with another C library nothing changes."""
    libc = _glibc() if wanted and device.type == "cpu" else None
    if libc is None:
        yield
        return
    _count_user(libc, 1)
    try:
        yield
    finally:
        _count_user(libc, -1)


def _count_user(libc: ctypes.CDLL, change: int) -> None:
    global _users
    with _lock:
        was_kept = _users > 0
        _users += change
        is_kept = _users > 0
        if was_kept == is_kept:
            return
        for number, within, afterwards in (_MMAP_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD):
            libc.mallopt(number, within if is_kept else afterwards)
        if not is_kept:
            libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    with contextlib.suppress(OSError, TypeError):  # TypeError: Windows
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            return libc
    return None
