"""Which device and which precision: chosen once, told in one line."""

import dataclasses
from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastlm.train.knobs import Knobs
from fastlm.wording import quantity

Precision = Literal["auto", "fp32", "tf32", "bf16", "bf16-params", "fp16"]

# From here on a step of a GPT is faster in bf16 on a CPU with AVX512-BF16: 1.4 times at 0.8 million parameters, up to 2
# times above; at 0.2 million nothing is gained (benchmarks/results/cpu-amd-epyc-avx512-breakdown.txt).
CPU_BF16_PARAMETERS = 500_000
MEASURED_BF16 = {"amx_bf16", "avx512_bf16"}  # a CPU that has the first has the second; not Arm's "bf16"
_AUTOCAST = {"bf16": torch.bfloat16, "bf16-params": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass
class PrecisionKnobs(Knobs):
    """Where and in which precision to compute."""

    precision: Precision = "auto"
    """Arithmetic of matrix products; parameters are fp32. bf16-params has bf16 parameters beside fp32 master weights:
    with AdamW a parameter takes 18 bytes (2, 4 of its master, 4 of the master's gradient, 8 of state), bf16 takes 16
    and 2 more in each forward pass; and what flows between the layers takes half of what it does in bf16."""
    device: str = "auto"
    """Where to train: auto, cpu, cuda, or one of several as in cuda:1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("precision", get_args(Precision))


@dataclasses.dataclass(frozen=True)
class DevicePrecision:
    """A device, a precision (fp32, tf32, bf16, bf16-params or fp16) and the reason for them."""

    device: torch.device
    precision: str
    reason: str

    def autocast(self) -> AbstractContextManager:
        """Context of every forward pass."""
        dtype = _AUTOCAST.get(self.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    @property
    def has_masters(self) -> bool:
        """Whether parameters are bf16 copies of fp32 master weights."""
        return self.precision == "bf16-params"

    def loss_scale(self) -> "LossScale":
        """Dynamic loss scaling for fp16, and 1 for everything else."""
        return LossScale(self.device, enabled=self.precision == "fp16")

    def apply(self) -> None:
        """Set the process-wide switches: fp32 products of a CUDA device, and which device is the current one."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")

    def __str__(self) -> str:
        return f"{self.precision} on {device_name(self.device)} ({self.reason})"


class LossScale:
    """A factor on the loss that keeps small fp16 gradients, adapted on the device: nobody waits for it.

    Halved by a step whose gradient is not finite, doubled after `growth_interval` steps in a row with a finite one
    (Micikevicius et al. 2018, arXiv 1710.03740). The optimiser divides it out again, in its own pass.
    """

    initial = 16.0  # on the summed loss of some 4,000 tokens it is the usual 65,536 on the mean
    growth_interval = 2000

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.enabled = enabled
        self.factor = torch.tensor(self.initial if enabled else 1.0, device=device)
        self._finite_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, is_finite: Tensor) -> None:
        """Adapt to a step whose gradient was finite or was not."""
        if not self.enabled:
            return
        steps = torch.where(is_finite, self._finite_steps + 1, 0)
        is_due = steps == self.growth_interval
        self.factor = torch.where(is_finite, torch.where(is_due, self.factor * 2, self.factor), self.factor / 2)
        self._finite_steps = torch.where(is_due, 0, steps)

    def state_dict(self) -> dict[str, float]:
        """JSON values; empty where losses are not scaled. Waits for the device."""
        return {"factor": self.factor.item(), "finite_steps": self._finite_steps.item()} if self.enabled else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; an empty one, of a run that scaled nothing, and one that is not needed are left.

        Raises ValueError for an entry that is no number.
        """
        if not state:
            return
        for name in ("factor", "finite_steps"):
            if type(state.get(name)) not in (int, float):
                raise ValueError(f"{name} is {state.get(name)!r}, expected a number")
        if not self.enabled:
            return
        self.factor.fill_(state["factor"])
        self._finite_steps.fill_(state["finite_steps"])


def choose_precision(config: PrecisionKnobs, local_rank: int = 0, num_parameters: int = 0) -> DevicePrecision:
    """The device and precision that config asks for, or for "auto" the fastest here for a model of this size.

    Raises ValueError if the device is absent or cannot do the precision asked for.
    """
    device = _choose_device(config.device, local_rank)
    if config.precision == "auto":
        return DevicePrecision(device, *_best_precision(device, num_parameters))
    reason = "as asked"
    if config.precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision tf32 needs a CUDA device, and this is {device.type}: use fp32 or auto")
    if (
        config.precision in ("bf16", "bf16-params")
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(False)
    ):
        raise ValueError(f"{device_name(device)} has no bf16 hardware: use fp16, fp32 or auto")
    if config.precision in ("bf16", "bf16-params") and device.type == "cpu" and not cpu_multiplies_bf16():
        reason = "as asked, but slow: this CPU has no bf16 hardware"
    return DevicePrecision(device, config.precision, reason)


def device_name(device: torch.device) -> str:
    """The device in words, such as cpu with 2 threads, or NVIDIA H200."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu with {quantity(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else str(device)


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has matrix or vector units for bf16."""
    return not cpu_features().isdisjoint({*MEASURED_BF16, "bf16"})


def cpu_features() -> set[str]:
    """The features of this CPU that Linux lists; elsewhere none."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return set()
    return set(flags.split())


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


def _best_precision(device: torch.device, num_parameters: int) -> tuple[str, str]:
    if device.type == "cpu" and not cpu_multiplies_bf16():
        return "fp32", "auto: this CPU has no bf16 hardware"
    if device.type == "cpu" and cpu_features().isdisjoint(MEASURED_BF16):
        return "fp32", "auto: whether the bf16 hardware of this CPU pays has not been measured"
    if device.type == "cpu":
        limit = quantity(CPU_BF16_PARAMETERS, "parameter")
        if num_parameters >= CPU_BF16_PARAMETERS:
            return "bf16", f"auto: this CPU has bf16 hardware, which pays from {limit} on"
        return "fp32", f"auto: this CPU's bf16 hardware pays from {limit} on"
    if torch.cuda.is_bf16_supported(False):
        return "bf16", "auto: it has bf16 tensor cores"
    return "fp16", "auto: it has no bf16 tensor cores; losses are scaled dynamically"
