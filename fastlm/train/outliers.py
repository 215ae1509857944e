"""Steps whose loss or gradient norm stands far above those before it, found without asking the device anything."""

from typing import Any

import torch
from torch import Tensor

WINDOW = 128  # accepted steps that a new one is compared with, as in llm.c; before there are so many none is an outlier
_NAMES = ("loss", "grad_norm")


class OutlierDetector:
    """Compares each step with the last WINDOW accepted ones: z = (value - mean) / standard deviation.

    A threshold of 0 finds no outlier, and costs nothing.
    """

    def __init__(self, threshold: float, device: torch.device) -> None:
        self._threshold = threshold
        self._history = torch.zeros(len(_NAMES), WINDOW, dtype=torch.float64, device=device)  # oldest first
        self._num_accepted = torch.zeros((), dtype=torch.int64, device=device)

    def is_outlier(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether a step's mean loss or gradient norm is more than the threshold above the mean of those before it."""
        if not self._threshold:
            return torch.zeros((), dtype=torch.bool, device=loss.device)
        deviation, mean = torch.std_mean(self._history, dim=1)
        excess = torch.stack([loss, grad_norm]).double() - mean
        return (self._num_accepted >= WINDOW) & (excess > self._threshold * deviation).any()

    def add(self, loss: Tensor, grad_norm: Tensor, skip: Tensor) -> None:
        """Remember a step, unless it was skipped."""
        if not self._threshold:
            return
        values = torch.stack([loss, grad_norm]).double()[:, None]
        self._history = torch.where(skip, self._history, torch.cat([self._history[:, 1:], values], dim=1))
        self._num_accepted += ~skip

    def state_dict(self) -> dict[str, Any]:
        """JSON values; empty where no outliers are looked for. Waits for the device."""
        if not self._threshold:
            return {}
        history = dict(zip(_NAMES, self._history.tolist(), strict=True))
        return {"num_accepted": self._num_accepted.item(), **history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; an empty one, of a run that looked for no outliers, is left.

        Raises ValueError for a history that is not of WINDOW numbers.
        """
        if not (state and self._threshold):
            return
        history = torch.tensor([state[name] for name in _NAMES], dtype=torch.float64)
        if history.shape != self._history.shape:
            raise ValueError(f"a history has shape {tuple(history.shape)}, expected {tuple(self._history.shape)}")
        self._history.copy_(history)
        self._num_accepted.fill_(state["num_accepted"])
