"""The learning rate as a pure function of the step, so that nothing about it needs to be saved or restored."""

import dataclasses
import math
from typing import Literal, get_args

from fastlm.train.knobs import Knobs

Schedule = Literal["cosine", "linear", "constant", "wsd", "noam"]
DecayShape = Literal["linear", "1-sqrt"]


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
    """Where cosine, linear and wsd end, as a share of the peak."""
    decay_ratio: float = 0.2
    """Share of the steps, the last ones, in which wsd falls."""
    decay_shape: DecayShape = "1-sqrt"
    """Shape of the fall of wsd."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_integers("steps", minimum=1)
        self.check_positive("learning_rate")
        self.check_choice("schedule", get_args(Schedule))
        self.check_choice("decay_shape", get_args(DecayShape))
        self.check_shares("warmup_ratio", "final_lr_ratio", "decay_ratio")
        if self.schedule == "wsd" and self.warmup_ratio + self.decay_ratio > 1:
            raise ValueError(
                f"{type(self).__name__}: warmup_ratio {self.warmup_ratio:g} and decay_ratio {self.decay_ratio:g} are "
                "more than all steps together, expected a sum of at most 1"
            )


def learning_rate(step: int, knobs: ScheduleKnobs) -> float:
    """Learning rate of update `step` (0, 1, ... knobs.steps - 1).

        rise    peak * (step + 1) / warmup                              in the first `warmup` updates
        cosine  final + (peak - final) * (1 + cos(pi * progress)) / 2    Loshchilov and Hutter 2017, arXiv 1608.03983
        linear  final + (peak - final) * (1 - progress)
        wsd     peak, then in the last steps                            Hu et al. 2024, arXiv 2404.06395
                final + (peak - final) * (1 - progress)
                final + (peak - final) * (1 - sqrt(progress))           Hägele et al. 2024, arXiv 2405.18392
        noam    peak * sqrt(warmup / (step + 1))                        Vaswani et al. 2017, arXiv 1706.03762, eq. 3

    progress goes from 0 at the end of the rise, or of wsd's plateau, towards 1 at knobs.steps. A noam without a rise
    falls from the first update on.
    """
    peak, final = knobs.learning_rate, knobs.learning_rate * knobs.final_lr_ratio
    warmup = round(knobs.warmup_ratio * knobs.steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if knobs.schedule == "noam":
        return peak * math.sqrt(max(1, warmup) / (step + 1))
    start = max(warmup, knobs.steps - round(knobs.decay_ratio * knobs.steps)) if knobs.schedule == "wsd" else warmup
    if knobs.schedule == "constant" or step < start:
        return peak
    progress = min(1.0, (step - start) / max(1, knobs.steps - start))
    shape = knobs.decay_shape if knobs.schedule == "wsd" else knobs.schedule
    return final + (peak - final) * _remaining(shape, progress)


def _remaining(shape: str, progress: float) -> float:
    """Share of the way down that is still to go."""
    if shape == "linear":
        return 1 - progress
    return 1 - math.sqrt(progress) if shape == "1-sqrt" else (1 + math.cos(math.pi * progress)) / 2
