import math

import pytest

from fastlm.train import TrainConfig
from fastlm.train.schedule import learning_rate


def rates(schedule, steps):
    """At sizes that float64 holds exactly: the rise ends at step 32, the half of the rest at step 80."""
    config = TrainConfig(steps=128, learning_rate=2.0, warmup_ratio=0.25, final_lr_ratio=0.25, schedule=schedule)
    return [learning_rate(step, config) for step in steps]


def test_learning_rate_rises_linearly_to_its_peak():
    assert rates("cosine", [0, 7, 31, 32]) == [0.0625, 0.5, 2.0, 2.0]


@pytest.mark.parametrize(
    ("schedule", "expected"), [("cosine", [1.25, 0.5]), ("linear", [1.25, 0.5]), ("constant", [2.0, 2.0])]
)
def test_learning_rate_falls_from_peak_to_final(schedule, expected):
    assert rates(schedule, [80, 128]) == expected


def test_cosine_starts_and_ends_slower_than_linear():
    (early, late), (early_linear, late_linear) = rates("cosine", [56, 104]), rates("linear", [56, 104])
    assert (early_linear, late_linear) == (1.625, 0.875)
    assert early > early_linear
    assert late < late_linear


def test_learning_rate_needs_no_warmup_and_no_decay():
    assert learning_rate(0, TrainConfig(steps=1, warmup_ratio=0.0, learning_rate=0.5)) == 0.5
    assert learning_rate(1, TrainConfig(steps=2, warmup_ratio=1.0, learning_rate=0.5)) == 0.5


# The definitions, in the papers' own words: t counts updates from 1, and a fall is told by the updates left.


def by_cosine(t, steps, warmup, decay, final):
    return (
        t / warmup
        if t <= warmup
        else final + (1 - final) * math.cos((t - 1 - warmup) / (steps - warmup) * math.pi / 2) ** 2
    )


def by_linear(t, steps, warmup, decay, final):
    return t / warmup if t <= warmup else (steps + 1 - t + final * (t - 1 - warmup)) / (steps - warmup)


def by_constant(t, steps, warmup, decay, final):
    return min(1.0, t / warmup) if warmup else 1.0


def by_wsd_linear(t, steps, warmup, decay, final):
    left = steps + 1 - t
    return by_constant(t, steps, warmup, decay, final) if left >= decay else final + (1 - final) * left / decay


def by_wsd_sqrt(t, steps, warmup, decay, final):
    done = max(0, t - 1 - (steps - decay))
    return by_constant(t, steps, warmup, decay, final) if not done else 1 - (1 - final) * (done / decay) ** 0.5


def by_noam(t, steps, warmup, decay, final):
    rise = max(1, warmup)
    return min(t**-0.5, t * rise**-1.5) / rise**-0.5


FORMULAS = {
    ("cosine", "linear"): by_cosine,
    ("linear", "linear"): by_linear,
    ("constant", "linear"): by_constant,
    ("wsd", "linear"): by_wsd_linear,
    ("wsd", "1-sqrt"): by_wsd_sqrt,
    ("noam", "linear"): by_noam,
}


@pytest.mark.parametrize("schedule", FORMULAS)
@pytest.mark.parametrize(
    ("steps", "warmup", "decay"), [(1, 0, 0), (1, 1, 0), (1, 0, 1), (2, 1, 1), (50, 0, 10), (50, 1, 49), (50, 20, 0)]
)
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_learning_rate_equals_its_formula_at_every_step(schedule, steps, warmup, decay, final):
    shares = {"warmup_ratio": warmup / steps, "decay_ratio": decay / steps, "final_lr_ratio": final}
    config = TrainConfig(schedule=schedule[0], decay_shape=schedule[1], steps=steps, learning_rate=0.25, **shares)
    expected = [0.25 * FORMULAS[schedule](step + 1, steps, warmup, decay, final) for step in range(steps)]
    assert [learning_rate(step, config) for step in range(steps)] == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_wsd_refuses_a_rise_and_a_fall_that_overlap():
    with pytest.raises(ValueError, match=r"warmup_ratio 0.6 and decay_ratio 0.5 are more than all steps together"):
        TrainConfig(schedule="wsd", warmup_ratio=0.6, decay_ratio=0.5)
