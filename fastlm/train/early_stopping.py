"""Early stopping: training ends once the held-out loss has not improved for a number of evaluations."""

import dataclasses
import math
from typing import Any

from fastlm.train.knobs import Knobs
from fastlm.wording import quantity


@dataclasses.dataclass
class EarlyStoppingKnobs(Knobs):
    """When training ends before its last step."""

    early_stopping_patience: int = 0
    """Stop after this many evaluations in a row without a better held-out loss; 0 never stops early."""
    early_stopping_min_delta: float = 0.0
    """By how much a held-out loss must be below the best one to be better."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_integers("early_stopping_patience", minimum=0)
        self.check_not_negative("early_stopping_min_delta")


class EarlyStopping:
    """The best held-out loss so far, and how many evaluations ago it was."""

    def __init__(self, knobs: EarlyStoppingKnobs) -> None:
        self._patience, self._min_delta = knobs.early_stopping_patience, knobs.early_stopping_min_delta
        self._best_loss, self._best_step, self._waited = math.inf, 0, 0

    @property
    def is_due(self) -> bool:
        """Whether patience is at its end."""
        return 0 < self._patience <= self._waited

    def observe(self, step: int, loss: float) -> None:
        """Take note of an evaluation; a loss that is not a number is no improvement."""
        if loss < self._best_loss - self._min_delta:
            self._best_loss, self._best_step, self._waited = loss, step, 0
        else:
            self._waited += 1

    def describe(self, step: int) -> str:
        """Why training stops after a step, in one line."""
        return (
            f"stopped early after step {step}: for {quantity(self._waited, 'evaluation')} the held-out loss has not "
            f"fallen more than {self._min_delta:g} below the best, {self._best_loss:.4f} at step {self._best_step}"
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        best_loss = self._best_loss if math.isfinite(self._best_loss) else None  # JSON knows no infinity
        return {"best_loss": best_loss, "best_step": self._best_step, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict. Raises KeyError or ValueError for an entry that is no number."""
        for name in ("best_step", "waited"):
            if type(state[name]) is not int:
                raise ValueError(f"{name} is {state[name]!r}, expected an integer")
        if type(state["best_loss"]) not in (float, type(None)):
            raise ValueError(f"best_loss is {state['best_loss']!r}, expected a number or null")
        self._best_loss = math.inf if state["best_loss"] is None else state["best_loss"]
        self._best_step, self._waited = state["best_step"], state["waited"]
