"""The random number generators of this process, captured as JSON so that a resumed run draws the same numbers."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators, those of all CUDA devices included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture(device: torch.device) -> dict[str, Any]:
    """State of the global generators, and of that of the device if it has its own."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    key = numpy_state["state"].pop("key")
    return {
        "python": [version, list(words), gauss],
        "numpy": numpy_state | {"key": key.tolist()},
        "torch": _as_text(torch.get_rng_state()),
        "cuda": _as_text(torch.cuda.get_rng_state(device)) if device.type == "cuda" else None,
    }


def restore(state: dict[str, Any], device: torch.device) -> None:
    """Inverse of capture; a CUDA state is restored only onto a CUDA device."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    numpy_state = dict(state["numpy"])
    key = np.array(numpy_state.pop("key"), dtype=np.uint32)
    np.random.set_state(numpy_state | {"state": numpy_state["state"] | {"key": key}})
    torch.set_rng_state(_from_text(state["torch"]))
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(_from_text(state["cuda"]), device)


@contextlib.contextmanager
def preserved(device: torch.device) -> Iterator[None]:
    """Run a block that may draw from the generators; afterwards training draws as if it had not."""
    state = capture(device)
    try:
        yield
    finally:
        restore(state, device)


def _as_text(state: torch.Tensor) -> str:
    return bytes(state.tolist()).hex()


def _from_text(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
