"""Every check of PyTorch's samples sees a fault, and an excuse is kept only as long as a call needs it."""

import functools

import pytest
import torch

from tests.support import sample_checks
from tests.support.sample_checks import CHECKS, Report, call_of_op, outcome, outcome_of_wrong_call, wrong_calls
from tests.support.sample_exceptions import WITHOUT_CHUNKS, Excuse
from tests.support.samples import Sample


@pytest.fixture(autouse=True)
def one_try(monkeypatch):
    """No luck is at work here."""
    monkeypatch.setattr(sample_checks, "TRIES", (1,))


def cube(x):
    return x * x * x


def wrong_cube(x):
    return cube(x)[None] if x.is_meta else 1.01 * cube(x)


def call_of(ours, theirs=cube):
    return call_of_op(ours, theirs, Sample(torch.randn(3, 4, requires_grad=True), (), {}))


def raising(x):
    raise ValueError("not this one")


@pytest.mark.parametrize("check", CHECKS)
def test_every_check_sees_a_wrong_result_and_a_refusal(check):
    assert outcome(call_of(cube), check) == "the same bits"
    with pytest.raises(AssertionError):
        outcome(call_of(wrong_cube), check)
    with pytest.raises(AssertionError, match="not this one, where torch computes it"):
        outcome(call_of(raising), check)
    assert outcome(call_of(raising, raising), check) == "refused by both"


def test_a_wrong_call_that_torch_refuses_must_be_refused():
    def of_three_rows(x):
        assert len(x) == 3
        return cube(x)

    outcomes = [outcome_of_wrong_call(call) for call in wrong_calls(call_of(of_three_rows, of_three_rows))]
    assert set(outcomes) == {"refused by both", "the same bits"}
    with pytest.raises(AssertionError, match="computed, where torch says"):
        list(map(outcome_of_wrong_call, wrong_calls(call_of(cube, of_three_rows))))


def test_an_excuse_that_no_call_needs_fails_the_report():
    def report_of(ours):
        report = Report([Excuse(("cube",), ("backward",), lambda sample: True, "cubes are rounded")])
        report.add("backward", "cube", functools.partial(outcome, call_of(ours), "backward"))
        report.conclude(lambda what, count: None)

    report_of(wrong_cube)
    with pytest.raises(AssertionError, match="no call needs the excuse any more that cubes are rounded"):
        report_of(cube)


def test_an_excused_call_is_still_held_against_the_op_without_chunks():
    excuse = Excuse(("cube",), ("backward",), lambda sample: True, "chunks", WITHOUT_CHUNKS)
    call = call_of(cube, lambda x: cube(x)[None])._replace(plain=call_of(cube).theirs)
    assert outcome(call, "backward", excuse) == "excused"
    with pytest.raises(AssertionError):
        outcome(call._replace(ours=call_of(wrong_cube).ours), "backward", excuse)


@pytest.mark.parametrize("numbers", [[3.0], [3.0, -1.0, 2.0]])
def test_draws_of_a_sample_differ(numbers):
    (drawn,) = zip(*(sample_checks.shuffled([torch.tensor(numbers)]) for _ in range(8)), strict=True)
    assert len({tuple(x.tolist()) for x in drawn}) > 1, "draws of the same numbers would judge no better than one"


def test_a_check_that_torch_always_refuses_fails_the_report():
    report = Report([])
    report.add("backward", "cube", functools.partial(outcome, call_of(raising, raising), "backward"))
    with pytest.raises(AssertionError, match="PyTorch refuses every sample"):
        report.conclude(lambda what, count: None)
