import io

import pytest
from rich.console import Console

from fastlm.evaluation import Evaluation
from fastlm.train.progress import (
    Sample,
    StepReport,
    clock,
    count,
    describe,
    describe_evaluation,
    describe_sample,
    live_progress,
)

REPORT = StepReport(
    step=20,
    loss=3.14159,
    grad_norm=0.5,
    learning_rate=1e-3,
    num_tokens=81920,
    tokens_per_second=12345.0,
    flops_per_second=4.2e12,
    mfu=None,
    memory=2 * 10**9,
    skipped_steps=0,
    seconds_left=3845.0,
)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999.7, "1.00k"),
        (12345, "12.3k"),
        (1.5e6, "1.50M"),
        (9.899e14, "990T"),
        (3e18, "3000P"),
        (4.5, "4.50"),
    ],
)
def test_count_keeps_three_digits(number, text):
    assert count(number) == text


def test_clock_shows_hours_only_when_there_are_some():
    assert [clock(0.4), clock(59.6), clock(3845)] == ["0:00", "1:00", "1:04:05"]


def test_describe_tells_flops_where_no_peak_is_known():
    start, end = "step   20/1000  loss 3.1416  grad norm 0.50  lr 1.00e-03  ", "memory 2.00GB  1:04:05 left"
    assert describe(REPORT, 1000) == f"{start}12.3k tok/s  4.20TFLOP/s  {end}"


def test_describe_tells_mfu_and_skipped_steps():
    from dataclasses import replace

    line = describe(replace(REPORT, mfu=0.4567, skipped_steps=3, memory=None), 50)
    assert (
        line == "step 20/50  loss 3.1416  grad norm 0.50  lr 1.00e-03  12.3k tok/s  45.7% MFU  3 skipped  1:04:05 left"
    )


def test_describe_evaluation_shows_the_baseline_beside_bits_per_byte():
    evaluation = Evaluation(loss=1.0, perplexity=2.71828, bits_per_byte=1.25, num_tokens=10)
    line = describe_evaluation(5, 50, evaluation, baseline=4.5)
    assert line == "step  5/50  held-out loss 1.0000  perplexity 2.72  1.250 bits/byte  (baseline 4.500)"


def test_describe_sample_is_one_line_whatever_the_sample():
    line = describe_sample(5, 50, Sample("def ", "f(x):\n    return x\n" * 20))
    assert line.startswith("step  5/50  sample: def f(x): return x f(x): return x")
    assert line.endswith(" ...")
    assert len(line) < 100


def test_live_progress_prints_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    with live_progress(Console(file=stream, width=20), 10) as (on_log, on_step):
        on_log("a line of [more] than twenty columns")
        on_step(1)
    assert stream.getvalue() == "a line of [more] than twenty columns\n"


def test_live_progress_keeps_the_bar_below_the_lines_of_a_terminal():
    stream = io.StringIO()
    with live_progress(Console(file=stream, width=80, force_terminal=True), 10) as (on_log, on_step):
        on_step(4)
        on_log("hello")
    assert "hello" in stream.getvalue()
    assert "4/10" in stream.getvalue()
