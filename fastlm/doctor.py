"""What this machine runs, on what, and why: the text of `fastlm doctor`, to read or to put into a bug report."""

import importlib.metadata
import platform
import sys

import torch

import fastlm
from fastlm.ops import _dispatch, _library
from fastlm.ops._device import capability
from fastlm.wording import quantity

PACKAGES = ("torch", "triton", "numpy", "tokenizers", "safetensors", "tyro", "rich", "matplotlib", "pyarrow")


def report() -> str:
    """Versions, devices, compiled libraries, and which implementation every op uses."""
    sections = {
        "versions": {"fastlm": fastlm.__version__, "python": sys.version.split()[0], "system": platform.platform()}
        | {name: version(name) for name in PACKAGES},
        "devices": devices(),
        "compiled libraries": _library.facts(),
        "ops on a CPU": {row.functions: on_cpu(row) for row in _dispatch.table()},
        "ops on a GPU": {row.functions: on_gpu(row) for row in _dispatch.table()},
    }
    return "\n".join(line for title, facts in sections.items() for line in (title, *aligned(facts), "")).rstrip()


def aligned(facts: dict[str, str]) -> list[str]:
    width = max(map(len, facts))
    return [f"  {name:<{width}}  {fact}" for name, fact in facts.items()]


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def devices() -> dict[str, str]:
    capability = torch.backends.cpu.get_cpu_capability()
    found = {"cpu": f"{quantity(torch.get_num_threads(), 'thread')}, PyTorch uses {capability}"}
    if not torch.cuda.is_available():
        built_for = torch.version.cuda
        why = "none is found" if built_for else "this PyTorch is built without CUDA"
        return found | {"cuda": f"none: {why}"}
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.0f} GiB"
    return found


def architectures() -> list[int]:
    """Of the GPUs that are here: 80 for sm_80."""
    return [capability(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]


def on_cpu(row: _dispatch.Row) -> str:
    if "C++" in row.on_cpu and not _library.is_loaded("cpu"):
        return f"PyTorch, for _cpu is {_library.facts()['_cpu']}"
    return row.on_cpu


def on_gpu(row: _dispatch.Row) -> str:
    for architecture in architectures():
        if architecture < row.oldest_gpu:
            return f"PyTorch, for a GPU here is sm_{architecture}, and the kernels take sm_{row.oldest_gpu} or newer"
    if "CUDA" in row.on_gpu and not _library.is_loaded("cuda"):
        return f"PyTorch, for _cuda is {_library.facts()['_cuda']}"
    if "Triton" in row.on_gpu and not _dispatch.HAS_TRITON:
        return "PyTorch, for triton is not installed"
    return row.on_gpu
