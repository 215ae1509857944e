"""The tolerance rule forgives luck and nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.accuracy import InaccurateError, assert_accurate, assert_accurate_over_draws

ROOT = Path(__file__).resolve().parents[2]
TRUTH = torch.tensor([1.0, -4.0, float("inf")], dtype=torch.float64)
EPS = torch.finfo(torch.float32).eps


def off_by(roundings: float) -> torch.Tensor:
    """float32 near TRUTH, the first element by so many ulp above it."""
    return TRUTH.float() + torch.tensor([roundings * EPS, 0.0, 0.0])


@pytest.mark.parametrize(
    ("ours", "torchs", "is_accurate"),
    [(0, 0, True), (2, 0, True), (3, 0, False), (4, 1, True), (5, 1, False)],  # a rounding of 4 is two ulp of 1
)
def test_rule_allows_twice_torchs_error_and_one_rounding(ours, torchs, is_accurate):
    if is_accurate:
        assert_accurate(off_by(ours), off_by(torchs), TRUTH)
    else:
        with pytest.raises(InaccurateError, match=r"y: error \S+ against float64, allowed \S+"):
            assert_accurate(off_by(ours), off_by(torchs), TRUTH, "y")


@pytest.mark.parametrize(
    "ours", [off_by(0).double(), off_by(0)[:2], off_by(0).nan_to_num(), off_by(0) * torch.tensor([float("nan"), 1, 1])]
)
def test_rule_refuses_another_dtype_shape_infinity_or_nan(ours):
    with pytest.raises(AssertionError):
        assert_accurate(ours, off_by(0), TRUTH)


def test_draws_are_judged_together():
    """Once torch is right by luck, and ours therefore off by too much: not so among more draws."""
    draws = iter([(3, 0), (3, 2), (1, 2)])
    assert_accurate_over_draws(lambda: assert_accurate(*map(off_by, next(draws)), TRUTH), 3)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_draws_count_alike_whatever_their_magnitude(scale):
    """ours is off by 6 ulp, and PyTorch by none but in the draw of this scale, by 2 or 1."""
    for torchs, is_accurate in ((2, True), (1, False)):
        draws = iter([(1.0, 0.0), (scale, torchs)])

        def test(draws=draws):
            scale, torchs = next(draws)
            assert_accurate(off_by(6) * scale, off_by(torchs) * scale, TRUTH * scale)

        if is_accurate:
            assert_accurate_over_draws(test, 2)
        else:
            with pytest.raises(InaccurateError):
                assert_accurate_over_draws(test, 2)


def test_a_fault_stays_a_fault_over_draws():
    draws = iter([(3, 0), (1, 2), (9, 2)])
    with pytest.raises(InaccurateError, match="y: error"):
        assert_accurate_over_draws(lambda: assert_accurate(*map(off_by, next(draws)), TRUTH, "y"), 3)


def test_comparisons_of_draws_do_not_mix():
    """The second result of each draw is off: what torch does to the first does not excuse it."""

    def test():
        assert_accurate(off_by(0), off_by(9), TRUTH)
        assert_accurate(off_by(3), off_by(0), TRUTH, "the second")

    with pytest.raises(InaccurateError, match="the second"):
        assert_accurate_over_draws(test, 3)


TESTS = """
import torch
from tests.support.accuracy import assert_accurate

def compared(ours, torchs):
    truth = torch.ones(1, dtype=torch.float64)
    assert_accurate((truth + ours * 2.0**-23).float(), (truth + torchs * 2.0**-23).float(), truth)

runs = []

def test_luck():
    runs.append(torch.rand(()))
    compared(3, 0 if len(runs) < 3 else 2)

def test_luck_was_drawn_again():
    assert len(runs) == 17 and runs[0] == runs[1] != runs[2]

def test_fault():
    compared(3, 0)
"""


def test_a_test_that_misses_the_rule_is_judged_by_many_draws(tmp_path):
    (tmp_path / "test_of_tests.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", f"--rootdir={ROOT}", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert "1 failed, 2 passed" in done.stdout
    assert "test_of_tests.py::test_fault - tests.support.accuracy.InaccurateError" in done.stdout
    assert "judged over 16 draws" in done.stdout
