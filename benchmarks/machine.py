"""What the figures were measured on: hardware, versions, commit, the machine's ceilings, and peak memory."""

import ctypes
import datetime
import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "flash-attn",
    "flash-attn-4",
    "transformers",
)


def describe(device: torch.device) -> dict[str, object]:
    """The hardware: device, processor, cores and threads in use, memory, GPU driver."""
    return {
        "device": device_name(device),
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "driver": _nvidia_driver() if device.type == "cuda" else None,
        "platform": platform.platform(),
    }


def versions() -> dict[str, str | None]:
    """Python, CUDA, and each package that can change a figure; None where a package is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found | {"torch": torch.__version__}  # with the build, which the package's version may lack


def provenance(commit: str | None = None) -> dict[str, object]:
    """When, from which commit and by which command; commit serves a copy of the tree that has no repository."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": head or commit,
        "dirty": bool(changed) if head else None,
        "command": " ".join(["python", "-m", "benchmarks", *sys.argv[1:]]),
    }


def commit_of(checkout: Path) -> str:
    """The commit that a checkout is at, short, or its path where it has no repository."""
    return _output("git", "-C", str(checkout), "rev-parse", "--short=10", "HEAD") or str(checkout)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model()


def slug(device_type: str, name: str) -> str:
    """A file name for a machine's results, such as nvidia-h200 or cpu-amd-epyc-7b13, from its device's name."""
    words = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm|c)\)", " ", name.lower())).strip("-")
    return f"cpu-{words}" if device_type == "cpu" else words


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found.group(1)
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _nvidia_driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _output(*command: str) -> str | None:
    """What a short command prints, or None if it is absent or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def answers(device: torch.device) -> bool:
    """Whether the device still works for this process: after an illegal address, say, every later call fails."""
    try:
        synchronize(device)
    except RuntimeError:
        return False
    return True


# Ceilings: what this machine can do at best. One call of run does `amount` of `unit`.


@dataclass(frozen=True)
class Ceiling:
    name: str
    unit: str
    amount: float
    run: Callable[[], object]


@functools.cache  # the buffers serve every case: on some virtual machines a fresh GB takes many seconds to fault in
def copy_ceiling(device: torch.device) -> Ceiling:
    """Copy between two warm buffers that together fit no cache: 256 MiB read and as much written."""
    source = torch.randn(2**26, device=device)
    destination = source.clone()  # written once already: fresh pages would cost a fault each
    return Ceiling("copy", "byte", 2.0 * source.nbytes, lambda: destination.copy_(source))


@functools.cache
def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> Ceiling:
    """A square product of random data: n = 8192 on a GPU, on a CPU as large as takes about 0.1 s, at most 2048.

    A CPU without bfloat16 instructions is 500 times slower in that type, so a fixed size would take minutes there.
    Zeros would run at a higher clock than any real data.
    """
    if device.type == "cuda":
        return _square_product(8192, device, dtype)
    n = 128
    while n < 2048:
        product = _square_product(n, device, dtype)
        product.run()
        start = time.perf_counter()
        product.run()
        if time.perf_counter() - start > 0.1 / 8:  # the next size takes 8 times as long
            break
        n *= 2
    return _square_product(n, device, dtype)


def _square_product(n: int, device: torch.device, dtype: torch.dtype) -> Ceiling:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    name = f"matmul {str(dtype).removeprefix('torch.')}"
    return Ceiling(name, "flop", 2.0 * n**3, lambda: torch.mm(a, b, out=out))


# Memory


@dataclass(frozen=True)
class Memory:
    """Bytes that a run holds at its peak, above what was held before it, and above what its results hold after it."""

    peak: int
    working: int


def memory_of(device: torch.device, run: Callable[[], object]) -> Memory | None:
    """What run holds at its peak, its results included and not.

    GPU: PyTorch's allocator counts. CPU: the kernel's high-water mark of resident memory (VmHWM), reset before the run,
    so scratch memory of every library counts, and memory that is allocated but never touched does not. Free heap is
    handed back first: reusing it would not show, and left over it would pass for results. None where the system offers
    no such mark (not Linux).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        results = run()  # held until both are read
        torch.cuda.synchronize(device)
        peak, after = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
    else:
        if not (_trim_heap() and _reset_high_water_mark()):
            return None
        before = _status_bytes("VmRSS")
        results = run()
        peak = _status_bytes("VmHWM")
        _trim_heap()
        after = _status_bytes("VmRSS")
    del results
    return Memory(max(peak - before, 0), max(peak - after, 0))


def _trim_heap() -> bool:
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return False
    return True


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
