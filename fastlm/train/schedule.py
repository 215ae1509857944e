"""The learning rate as a pure function of the step, so that nothing about it needs to be saved or restored."""

import dataclasses
import math
from typing import Literal, get_args

from fastlm.train.knobs import Knobs

Schedule = Literal["cosine", "linear", "constant"]


@dataclasses.dataclass
class ScheduleKnobs(Knobs):
    """How the learning rate goes over the steps."""

    steps: int = 500
    """Optimiser updates in the whole run, counted from the very start."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """Shape of the learning rate after warmup."""
    warmup_ratio: float = 0.05
    """Share of the steps in which the learning rate rises linearly to its peak."""
    final_lr_ratio: float = 0.1
    """Where the schedule ends, as a share of the peak."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_integers("steps", minimum=1)
        self.check_positive("learning_rate")
        self.check_choice("schedule", get_args(Schedule))
        self.check_shares("warmup_ratio", "final_lr_ratio")


def learning_rate(step: int, knobs: ScheduleKnobs) -> float:
    """Learning rate of update `step` (0, 1, ... knobs.steps - 1).

        rise    peak * (step + 1) / warmup                              in the first `warmup` updates
        cosine  final + (peak - final) * (1 + cos(pi * progress)) / 2    Loshchilov and Hutter 2017, arXiv 1608.03983
        linear  final + (peak - final) * (1 - progress)

    progress goes from 0 at the end of the rise towards 1 at knobs.steps.
    """
    peak, final = knobs.learning_rate, knobs.learning_rate * knobs.final_lr_ratio
    warmup = round(knobs.warmup_ratio * knobs.steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, knobs.steps - warmup))
    if knobs.schedule == "constant":
        return peak
    remaining = 1 - progress if knobs.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return final + (peak - final) * remaining
