"""Loads the compiled libraries, once, and knows which are there and why the others are not.

They hold kernels for ops whose schemas are defined in Python, so an op works without them too: more slowly, in
PyTorch's own code.
"""

import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastlm.ops._triton import DTYPES, is_exporting

PACKAGE = Path(__file__).resolve().parent.parent
INSTRUCTION_SETS = ("portable", "AVX2", "AVX-512")  # by the number of torch.ops.fastlm.cpu_instruction_set
# Elements of a tensor below which PyTorch's CPU code is faster: there the price of a call decides, and ours costs more.
SMALL = {
    "layer_norm": 1 << 20,
    "add_layer_norm": 1 << 18,
    "rms_norm": 1 << 15,
    "add_rms_norm": 1 << 15,
    "softmax": math.inf,  # always: PyTorch's own is as fast
    "log_softmax": 1 << 20,
    "masked softmax": 0,
    "gelu none": 1 << 23,
    "gelu tanh": 1 << 15,
    "bias_gelu": 1 << 16,
    "swiglu": 1 << 17,
    "rotary": 1 << 14,
}
SHORT_ROW = 256  # columns below which PyTorch's log_softmax is faster however many the rows are
REBUILD = "pip install . builds it"


@dataclass(frozen=True)
class Library:
    """A compiled library: whether its kernels can be called, and in words where it is or what keeps it away."""

    loaded: bool
    state: str


def _load(name: str) -> Library:
    path = PACKAGE / f"{name}.so"
    if not path.exists():
        return Library(False, f"not built; {REBUILD}")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Library(False, f"does not load ({error.__cause__ or error}); {REBUILD}")
    return Library(True, str(path))


def _load_cuda() -> Library:
    if torch.version.cuda is None:
        return Library(False, "not used: this PyTorch is built without CUDA")
    return _load("_cuda")


_CPU = _load("_cpu")
_CUDA = _load_cuda()
_SERVES = {"cpu": _CPU, "cuda": _CUDA}


def has_cross_entropy(tensor: Tensor) -> bool:
    """Whether a compiled cross entropy takes logits on this tensor's device and of its dtype."""
    library = _SERVES.get(tensor.device.type)
    return library is not None and library.loaded and tensor.dtype in DTYPES and not is_exporting()


def has_layer(op: str, tensor: Tensor) -> bool:
    """Whether compiled code of this norm, softmax, activation or rotary serves the tensor: on a CPU, if not small."""
    return tensor.is_cpu and not is_exporting() and tensor.numel() >= SMALL[op] and _CPU.loaded


def has_plain_softmax(op: str, tensor: Tensor) -> bool:
    """The same of a softmax or log_softmax without mask, scale or causality, which PyTorch's own code computes well."""
    return has_layer(op, tensor) and tensor.dim() > 0 and tensor.shape[-1] >= SHORT_ROW


def has_attention(tensor: Tensor) -> bool:
    """Whether compiled attention serves the tensor."""
    return tensor.is_cpu and _CPU.loaded and tensor.dtype in DTYPES and not is_exporting()


def is_small(op: str, tensor: Tensor) -> bool:
    """Whether the price of a call of this op decides on a CPU."""
    return tensor.is_cpu and (is_exporting() or tensor.numel() < SMALL[op])


def as_floats(parameter: Tensor | None) -> Tensor | None:
    """A weight or bias as the compiled layers take it: float32, contiguous."""
    return None if parameter is None else parameter.to(torch.float32).contiguous()


def is_loaded(device_type: str) -> bool:
    """Whether the compiled kernels of "cpu" or "cuda" can be called."""
    return _SERVES[device_type].loaded


def facts() -> dict[str, str]:
    """For each library, where it is and what it uses, or what keeps it away."""
    cpu = _CPU.state
    if _CPU.loaded:
        cpu += f" ({INSTRUCTION_SETS[torch.ops.fastlm.cpu_instruction_set(-1)]})"
    packing = PACKAGE / f"_packing{sysconfig.get_config_var('EXT_SUFFIX')}"
    packing_state = str(packing) if packing.exists() else f"not built; {REBUILD}"
    return {"_cpu": cpu, "_cuda": _CUDA.state, "_packing": packing_state}
