"""What a run tells: log lines, metrics.jsonl and the loss curve, all from the same records."""

import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from fastlm.evaluate import Evaluation
from fastlm.train.config import TrainConfig
from fastlm.train.distributed import Ranks
from fastlm.train.metrics import MetricsLog
from fastlm.train.plots import draw_losses
from fastlm.train.precision import Arithmetic, device_name
from fastlm.train.progress import StepReport, count, describe, describe_evaluation
from fastlm.train.throughput import Stopwatch, peak_flops, peak_memory
from fastlm.train.update import Totals


class RunLog:
    """Reports on training after first_step; only rank 0 writes files and says anything.

    totals    at first_step, whence rates are measured
    reported  at the last report of the run that this one resumes: the next line is the mean since then, as if the run
              had never stopped
    """

    def __init__(
        self,
        config: TrainConfig,
        arithmetic: Arithmetic,
        ranks: Ranks,
        say: Callable[[str], None],
        *,
        first_step: int,
        totals: Totals,
        reported: Totals,
    ) -> None:
        self.last: StepReport | None = None
        self._config, self._arithmetic, self._ranks, self._say = config, arithmetic, ranks, say
        self._metrics = MetricsLog(config.out / "metrics.jsonl", first_step) if ranks.is_main else None
        self._peak = peak_flops(device_name(arithmetic.device), arithmetic.precision)
        self._first_step, self._timed, self.reported = first_step, totals, reported
        self._seconds = 0.0  # of training since first_step
        self._watch = Stopwatch(arithmetic.device)
        if self._peak:
            say(f"MFU = useful tokens/s * FLOPs per token / ({ranks.world_size} * {count(self._peak)}FLOP/s)")

    def paused(self) -> AbstractContextManager[None]:
        """Context for what is no training, such as evaluating and saving."""
        return self._watch.paused()

    def report(self, step: int, totals: Totals, grad_norm: float, learning_rate: float, flops_per_token: float) -> None:
        """Tell of the steps since the report before."""
        seconds = self._watch.lap()
        self._seconds += seconds
        rate = (totals.num_tokens - self._timed.num_tokens) / seconds
        flops = rate * flops_per_token
        num_tokens = totals.num_tokens - self.reported.num_tokens
        self.last = StepReport(
            step=step,
            loss=(totals.loss_sum - self.reported.loss_sum) / num_tokens if num_tokens else math.nan,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            num_tokens=totals.num_tokens,
            tokens_per_second=rate,
            flops_per_second=flops,
            mfu=flops / self._peak / self._ranks.world_size if self._peak else None,
            memory=peak_memory(self._arithmetic.device),
            skipped_steps=totals.skipped_steps,
            seconds_left=self._seconds / (step - self._first_step) * (self._config.steps - step),
        )
        self._timed, self.reported = totals, totals
        self._say(describe(self.last, self._config.steps))
        self._write(dataclasses.asdict(self.last))

    def evaluated(self, step: int, evaluation: Evaluation, baseline: float | None) -> None:
        """Tell of an evaluation."""
        self._say(describe_evaluation(step, self._config.steps, evaluation, baseline))
        self._write({"step": step} | {f"eval_{key}": value for key, value in dataclasses.asdict(evaluation).items()})

    def close(self) -> None:
        """Close the metrics."""
        if self._metrics is not None:
            self._metrics.close()

    def draw(self) -> None:
        """Draw the loss curve; whatever is wrong with matplotlib or the file is told, and fails no run."""
        if not self._ranks.is_main:
            return
        try:
            draw_losses(self._config.out / "metrics.jsonl", self._config.out / "losses.png")
        except Exception as error:
            self._say(f"losses.png was not drawn: {' '.join(str(error).split())}")

    def _write(self, record: dict[str, Any]) -> None:
        """Append to the metrics; where that fails, the run, whose checkpoints may go elsewhere, goes on without."""
        if self._metrics is None:
            return
        try:
            self._metrics.write(record)
        except OSError as error:
            self._say(f"metrics end here: {error.filename}: {error.strerror}; training goes on without them")
            self.close()
            self._metrics = None
