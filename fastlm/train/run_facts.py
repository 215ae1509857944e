"""run.json: what a run is, for whoever looks at it later: settings, model, packing, machine and versions."""

import contextlib
import datetime
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastlm import __version__
from fastlm.files import atomic_write
from fastlm.train.config import TrainConfig
from fastlm.train.precision import DevicePrecision, device_name
from fastlm.train.protocols import num_parameters
from fastlm.train.throughput import peak_flops

RUN_FILE = "run.json"


def run_facts(
    config: TrainConfig,
    model: nn.Module,
    precision: DevicePrecision,
    *,
    metadata: dict[str, Any],
    world_size: int,
    packing: object,
    baseline: float | None,
    first_step: int,
) -> dict[str, Any]:
    """All that does not change while a run goes on; JSON values.

    packing   what the loader reports of itself, None if that is nothing
    baseline  bits per byte of a trivial model
    """
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "first_step": first_step,
        "config": config.as_dict(),
        "metadata": metadata,
        "world_size": world_size,
        "model": {
            "class": type(getattr(model, "module", model)).__name__,  # a wrapper's own name would tell nothing
            "num_parameters": num_parameters(model),
        },
        "packing": None if packing is None else str(packing),
        "baseline": baseline,
        "precision": str(precision),
        "peak_flops": peak_flops(device_name(precision.device), precision.precision),
        "machine": machine(precision.device),
        "versions": {
            "fastlm": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        },
    }


def machine(device: torch.device) -> dict[str, Any]:
    """The hardware that a run's speed depends on."""
    return {
        "device": device_name(device),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }


def write_facts(out: Path, facts: dict[str, Any]) -> None:
    """Write run.json, whole or not at all. Raises OSError if it cannot be written."""
    with atomic_write(out / RUN_FILE) as file:
        file.write((json.dumps(facts, indent=1) + "\n").encode())


def _processor() -> str:
    with contextlib.suppress(OSError):  # there is no such file but on Linux
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()
