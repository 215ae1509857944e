"""Which device and which arithmetic: chosen once, told in one line."""

import dataclasses
from contextlib import AbstractContextManager
from typing import Any

import torch

from fastlm.train.config import TrainConfig

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """A device, a precision (fp32, tf32, bf16 or fp16) and the reason for them."""

    device: torch.device
    precision: str
    reason: str

    def autocast(self) -> AbstractContextManager:
        """Context of every forward pass."""
        dtype = _AUTOCAST.get(self.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def scaler(self) -> torch.amp.GradScaler:
        """Dynamic loss scaling for fp16, and a pass-through for everything else."""
        # On the summed loss of some 4,000 tokens, 16 is PyTorch's usual 65,536 on the mean; it adapts from there.
        return torch.amp.GradScaler(self.device.type, init_scale=16.0, enabled=self.precision == "fp16")

    def load_scaler(self, scaler: torch.amp.GradScaler, state: dict[str, Any]) -> None:
        """Put scaler into a saved state: empty, and left out, where that run or this one is not in fp16.

        Raises ValueError if the state is not a GradScaler's: PyTorch would find that out at the first step.
        """
        if not state:
            return
        ours = self.scaler().state_dict() or torch.amp.GradScaler("cpu").state_dict()
        for key in sorted(ours.keys() | state.keys()):
            if type(state.get(key)) not in (int, float):
                raise ValueError(f"{key} is {state.get(key)!r}, expected a number")
        scaler.load_state_dict(state)

    def apply(self) -> None:
        """Set the process-wide switches: fp32 products of a CUDA device, and which device is the current one."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")

    def __str__(self) -> str:
        return f"{self.precision} on {device_name(self.device)} ({self.reason})"


def choose(config: TrainConfig, local_rank: int = 0) -> Arithmetic:
    """The device and precision that config asks for, or for "auto" the best that this machine has.

    Raises ValueError if the device is absent or cannot do the precision asked for.
    """
    device = _choose_device(config.device, local_rank)
    if config.precision == "auto":
        return Arithmetic(device, *_best_precision(device))
    reason = "as asked"
    if config.precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision tf32 needs a CUDA device, and this is {device.type}: use fp32 or auto")
    if config.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise ValueError(f"{device_name(device)} has no bf16 hardware: use fp16, fp32 or auto")
    if config.precision == "bf16" and device.type == "cpu" and not cpu_multiplies_bf16():
        reason = "as asked, but slow: this CPU has no bf16 hardware"
    return Arithmetic(device, config.precision, reason)


def device_name(device: torch.device) -> str:
    """The device in words, such as cpu with 2 threads, or NVIDIA H200."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu with {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has matrix or vector units for bf16, by the features that Linux lists; elsewhere False."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return False
    return not {"amx_bf16", "avx512_bf16", "bf16"}.isdisjoint(flags.split())


def _choose_device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"TrainConfig: device is {name!r}, expected auto, cpu, cuda or cuda:<number>") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"TrainConfig: device is {name!r}, expected auto, cpu, cuda or cuda:<number>")
    if device.type == "cuda":
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"device is {device}, but this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def _best_precision(device: torch.device) -> tuple[str, str]:
    if device.type == "cpu" and cpu_multiplies_bf16():
        return "fp32", "auto: bf16 steps are no faster on a CPU so far"
    if device.type == "cpu":
        return "fp32", "auto: this CPU has no bf16 hardware"
    if torch.cuda.is_bf16_supported(False):
        return "bf16", "auto: it has bf16 tensor cores"
    return "fp16", "auto: it has no bf16 tensor cores; losses are scaled dynamically"
