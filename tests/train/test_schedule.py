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
