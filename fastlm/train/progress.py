"""What a user sees while training: a line per report, and in a terminal a live bar below the lines."""

import contextlib
import dataclasses
import textwrap
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from fastlm.evaluation import Evaluation

if TYPE_CHECKING:
    from rich.console import Console


_POWERS = ["", "k", "M", "G", "T", "P"]


@dataclasses.dataclass(frozen=True)
class StepReport:
    """The record of a log line; the fields are the keys in metrics.jsonl."""

    step: int
    loss: float  # mean over the valid tokens since the report before
    grad_norm: float  # of this step, before clipping
    learning_rate: float
    num_tokens: int  # valid tokens trained on since the start of the run
    tokens_per_second: float
    flops_per_second: float
    mfu: float | None
    memory: int | None
    skipped_steps: int  # since the start of the run
    seconds_left: float


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a model made of a prompt; the fields are keys in samples.jsonl."""

    prompt: str
    text: str  # the continuation


def describe(report: StepReport, steps: int) -> str:
    """The report in one line of fixed columns."""
    parts = [
        f"step {report.step:>{len(str(steps))}}/{steps}",
        f"loss {report.loss:.4f}",
        f"grad norm {report.grad_norm:.2f}",
        f"lr {report.learning_rate:.2e}",
        f"{count(report.tokens_per_second)} tok/s",
        f"{count(report.flops_per_second)}FLOP/s" if report.mfu is None else f"{report.mfu:.1%} MFU",
    ]
    if report.memory is not None:
        parts.append(f"memory {count(report.memory)}B")
    if report.skipped_steps:
        parts.append(f"{report.skipped_steps} skipped")
    return "  ".join([*parts, f"{clock(report.seconds_left)} left"])


def describe_evaluation(
    step: int, steps: int, evaluation: Evaluation, baseline: float | None = None, *, averaged: bool = False
) -> str:
    """An evaluation in one line; baseline is the bits per byte of a trivial model, averaged tells of EMA weights."""
    parts = [
        f"step {step:>{len(str(steps))}}/{steps}",
        f"held-out loss {evaluation.loss:.4f}",
        f"perplexity {evaluation.perplexity:.2f}",
    ]
    if evaluation.bits_per_byte is not None:
        parts.append(f"{evaluation.bits_per_byte:.3f} bits/byte")
        if baseline is not None:
            parts.append(f"(baseline {baseline:.3f})")
    if averaged:
        parts.append("(EMA weights)")
    return "  ".join(parts)


def describe_sample(step: int, steps: int, sample: Sample) -> str:
    """The beginning of a sample in one line."""
    words = textwrap.shorten(sample.prompt + sample.text, 72, placeholder=" ...")
    return f"step {step:>{len(str(steps))}}/{steps}  sample: {words}"


def count(number: float) -> str:
    """Three digits and a power of a thousand: 999, 12.3k, 1.23M, 85.0G."""
    power = 0
    while abs(number) >= 999.5 and power < len(_POWERS) - 1:
        number, power = number / 1000, power + 1
    digits = 0 if power == 0 and number == int(number) else max(0, 3 - len(str(int(abs(number)))))
    return f"{number:.{digits}f}{_POWERS[power]}"


def clock(seconds: float) -> str:
    """4:05, or 1:04:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@contextlib.contextmanager
def live_progress(console: "Console", steps: int) -> Iterator[tuple[Callable[[str], None], Callable[[int], None]]]:
    """(on_log, on_step) for a Trainer: lines on the console, and below them a bar if it is a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    def on_log(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    columns = TextColumn("training"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=steps)
        yield on_log, lambda step: bar.update(task, completed=step)
