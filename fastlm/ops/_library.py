"""Loads the compiled libraries, once, and knows which are there and why the others are not.

They hold kernels for ops whose schemas are defined in Python, so an op works without them too: more slowly, in
PyTorch's own code.
"""

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

PACKAGE = Path(__file__).resolve().parent.parent
INSTRUCTION_SETS = (
    "portable",
    "AVX2",
    "AVX-512",
    "AVX-512 with BF16",
)  # by the number of torch.ops.fastlm.cpu_instruction_set
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


LIBRARIES = {"cpu": _load("_cpu"), "cuda": _load_cuda()}


def as_floats(parameter: Tensor | None) -> Tensor | None:
    """A weight or bias as the compiled layers take it: float32, contiguous."""
    return None if parameter is None else parameter.to(torch.float32).contiguous()


def is_loaded(device_type: str) -> bool:
    """Whether compiled kernels for this type of device can be called."""
    return device_type in LIBRARIES and LIBRARIES[device_type].loaded


def instruction_set() -> str:
    """What the CPU kernels run in, one of INSTRUCTION_SETS."""
    return INSTRUCTION_SETS[torch.ops.fastlm.cpu_instruction_set(-1)]


def has_bf16_units() -> bool:
    """Whether bf16_gemm_ runs in the bfloat16 units of this CPU; without them it is slower than float32 products."""
    return is_loaded("cpu") and instruction_set() == "AVX-512 with BF16"


def facts() -> dict[str, str]:
    """For each library, where it is and what it uses, or what keeps it away."""
    cpu = LIBRARIES["cpu"].state
    if is_loaded("cpu"):
        cpu += f" ({instruction_set()})"
    packing = PACKAGE / f"_packing{sysconfig.get_config_var('EXT_SUFFIX')}"
    packing_state = str(packing) if packing.exists() else f"not built; {REBUILD}"
    return {"_cpu": cpu, "_cuda": LIBRARIES["cuda"].state, "_packing": packing_state}
