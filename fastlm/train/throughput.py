"""How fast training goes, and what share of the device's peak that is.

    MFU = useful tokens per second * model.flops_per_token(T) / (ranks * peak)

Useful tokens have a target, so padding does not count. Peaks are dense, without sparsity, from NVIDIA's data sheets.
"""

import contextlib
import ctypes
import os
import re
import sys
import time
from collections.abc import Iterator

import torch

# (words of the device name, TFLOP/s in bf16 and fp16, in tf32, in fp32); the first row whose words all occur is taken
_PEAKS: list[tuple[str, float, float, float]] = [
    ("B200", 2250, 1125, 75),
    ("H200 NVL", 835, 418, 60),
    ("H200", 989, 495, 67),
    ("H100 NVL", 835, 418, 60),
    ("H100 PCIe", 756, 378, 51),
    ("H100", 989, 495, 67),
    ("A100", 312, 156, 19.5),
    ("A40", 149.7, 74.8, 37.4),
    ("A10", 125, 62.5, 31.2),
    ("L40S", 362, 183, 91.6),
    ("L4", 121, 60, 30.3),
    ("V100", 125, 15.7, 15.7),
    ("T4", 65, 8.1, 8.1),
    ("RTX 4090", 165, 82.6, 82.6),
    ("RTX 3090", 71, 35.6, 35.6),
]
_VARIANTS = {"Laptop", "D", "Ti"}  # same words, other peaks


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak dense FLOP/s of a device in a precision, or None if the device is not in the table."""
    words = set(re.split(r"[\s-]+", device_name))
    if words & _VARIANTS:
        return None
    column = {"bf16": 0, "bf16-params": 0, "fp16": 0, "tf32": 1, "fp32": 2}[precision]
    return next((peaks[column] * 1e12 for name, *peaks in _PEAKS if words.issuperset(name.split())), None)


def peak_memory(device: torch.device) -> int | None:
    """Most bytes this process has held so far: allocated on a CUDA device, resident on a CPU; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024


def resident_memory() -> int | None:
    """Bytes of this process that are in physical memory now, without free heap; None if unknown."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)  # else what is used again later would not show as growth
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        return None


class Stopwatch:
    """Seconds of training, without those spent inside paused()."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._mark = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds since the last lap; never 0."""
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        return max(seconds, 1e-9)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside, such as evaluating and saving."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # else training steps still queued would count as pause
        began = time.perf_counter()
        yield
        self._mark += time.perf_counter() - began
