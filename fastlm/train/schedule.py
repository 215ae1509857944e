"""The learning rate as a pure function of the step, so that nothing about it needs to be saved or restored."""

import math

from fastlm.train.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of update `step` (0, 1, ... config.steps - 1).

        rise    peak * (step + 1) / warmup                              in the first `warmup` updates
        cosine  final + (peak - final) * (1 + cos(pi * progress)) / 2    Loshchilov and Hutter 2017, arXiv 1608.03983
        linear  final + (peak - final) * (1 - progress)

    progress goes from 0 at the end of the rise towards 1 at config.steps.
    """
    peak, final = config.learning_rate, config.learning_rate * config.final_learning_rate
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, config.steps - warmup))
    if config.schedule == "constant":
        return peak
    remaining = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return final + (peak - final) * remaining
