"""What this machine runs, on what, and why: the text of `fastlm doctor`, to read or to put into a bug report."""

import importlib.metadata
import platform
import sys

import torch

import fastlm
from fastlm.ops import _library
from fastlm.ops._triton import HAS_TRITON
from fastlm.ops.cross_entropy import SMALL

PACKAGES = ("torch", "triton", "numpy", "tokenizers", "safetensors", "tyro", "rich", "matplotlib", "pyarrow")


def report() -> str:
    """Versions, devices, compiled libraries, and for every op what serves it."""
    sections = {
        "versions": {"fastlm": fastlm.__version__, "python": sys.version.split()[0], "system": platform.platform()}
        | {name: version(name) for name in PACKAGES},
        "devices": devices(),
        "compiled libraries": _library.facts(),
        "ops on a CPU": ops_on_cpu(),
        "ops on a GPU": ops_on_gpu(),
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
    found = {"cpu": f"{torch.get_num_threads()} threads, PyTorch uses {capability}"}
    if not torch.cuda.is_available():
        built_for = torch.version.cuda
        why = "none is found" if built_for else "this PyTorch is built without CUDA"
        return found | {"cuda": f"none: {why}"}
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.0f} GiB"
    return found


def ops_on_cpu() -> dict[str, str]:
    loss = logits = layers = softmax = attention = f"PyTorch (_cpu: {_library.facts()['_cpu']})"
    if _library.is_loaded("cpu"):
        logits = "C++ for float32, float16 and bfloat16 logits and class targets"
        loss = f"{logits}; PyTorch for up to {SMALL:,} logits of float32"
        layers = "C++ for float32, float16 and bfloat16, PyTorch for small tensors; Triton under TRITON_INTERPRET=1"
        attention = (
            "C++ with options, and of documents of up to 512 tokens, of rows of 96 to 512; else PyTorch's fused kernel"
        )
        softmax = (
            "C++ if scaled, masked or causal, and for large log_softmax of long rows, else PyTorch; Triton as above"
        )
    return {
        "layer_norm, rms_norm, and both after add": layers,
        "apply_rotary": layers,
        "gelu, bias_gelu, swiglu": layers,
        "cross_entropy": loss,
        "linear_cross_entropy": f"PyTorch products on chunks of rows, between them cross_entropy: {logits}",
        "softmax, log_softmax": softmax,
        "attention, dense and packed": attention,
        "others": "PyTorch",
    }


def ops_on_gpu() -> dict[str, str]:
    kernel = "Triton" if HAS_TRITON else "PyTorch, because triton is not installed"
    loss = "CUDA for float32, float16 and bfloat16 logits and class targets"
    if not _library.is_loaded("cuda"):
        loss = f"PyTorch (_cuda: {_library.facts()['_cuda']})"
    return {
        "layer_norm, rms_norm, and both after add": kernel,
        "cross_entropy": loss,
        "linear_cross_entropy": f"PyTorch products on chunks of rows, between them cross_entropy: {loss}",
        "apply_rotary": kernel,
        "gelu, bias_gelu, swiglu": kernel,
        "softmax, log_softmax": f"{kernel} along the last dimension, PyTorch along others",
        "attention, dense and packed": kernel,
        "others": "PyTorch",
    }
