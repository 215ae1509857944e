"""What a run tells: log lines, metrics.jsonl and other sinks, samples and the loss curve.

Records of a step, of an evaluation ("eval_..."), and of the layers' norms ("layers") go to every sink; samples go to
samples.jsonl.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, get_args

from fastlm.evaluation import Evaluation
from fastlm.train.distributed import Ranks
from fastlm.train.knobs import Knobs
from fastlm.train.metrics import MetricsLog
from fastlm.train.plots import plot_losses
from fastlm.train.precision import DevicePrecision, device_name
from fastlm.train.progress import Sample, StepReport, count, describe, describe_evaluation, describe_sample
from fastlm.train.sinks import Sink, Tracker, reason
from fastlm.train.throughput import Stopwatch, peak_flops, peak_memory
from fastlm.train.update import Totals


@dataclasses.dataclass
class LogKnobs(Knobs):
    """What a run tells, and where."""

    log_interval: int = 10
    """Steps between log lines."""
    log_to: tuple[Tracker, ...] = ()
    """Where the figures go besides metrics.jsonl: tensorboard, wandb, trackio; any of them, each if it is installed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_integers("log_interval", minimum=1)
        self.check_tuple("log_to", f"a tuple of {', '.join(get_args(Tracker))}, or an empty one")
        for tracker in self.log_to:
            self.check_choice("log_to", get_args(Tracker), tracker)


class RunLog:
    """Reports on training after first_step; only rank 0 writes files and says anything.

    totals    at first_step, whence rates are measured
    logged    at the last report of the run that this one resumes: the next line is the mean since then, as if the run
              had never stopped
    sinks     where records go besides metrics.jsonl; they are closed with it
    samples   whether there will be any
    """

    def __init__(
        self,
        out: Path,
        steps: int,
        precision: DevicePrecision,
        ranks: Ranks,
        on_log: Callable[[str], None],
        *,
        first_step: int,
        totals: Totals,
        logged: Totals,
        sinks: Iterable[Sink] = (),
        samples: bool = False,
    ) -> None:
        self.last: StepReport | None = None
        self._out, self._steps, self._precision, self._ranks, self._log = out, steps, precision, ranks, on_log
        main = ranks.is_main
        self._sinks: list[Sink] = [MetricsLog(out / "metrics.jsonl", first_step), *sinks] if main else []
        self._samples: list[Sink] = [MetricsLog(out / "samples.jsonl", first_step)] if main and samples else []
        self._peak = peak_flops(device_name(precision.device), precision.precision)
        self._first_step, self._timed, self.logged = first_step, totals, logged
        self._seconds = 0.0  # of training since first_step
        self._watch = Stopwatch(precision.device)
        if self._peak:
            on_log(f"MFU = useful tokens/s * FLOPs per token / ({ranks.world_size} * {count(self._peak)}FLOP/s)")

    def paused(self) -> AbstractContextManager[None]:
        """Context for what is no training, such as evaluating and saving."""
        return self._watch.paused()

    def report(self, step: int, totals: Totals, grad_norm: float, learning_rate: float, flops_per_token: float) -> None:
        """Tell of the steps since the report before."""
        seconds = self._watch.elapsed()
        self._seconds += seconds
        rate = (totals.num_tokens - self._timed.num_tokens) / seconds
        flops = rate * flops_per_token
        num_tokens = totals.num_tokens - self.logged.num_tokens
        self.last = StepReport(
            step=step,
            loss=(totals.loss_sum - self.logged.loss_sum) / num_tokens if num_tokens else math.nan,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            num_tokens=totals.num_tokens,
            tokens_per_second=rate,
            flops_per_second=flops,
            mfu=flops / self._peak / self._ranks.world_size if self._peak else None,
            memory=peak_memory(self._precision.device),
            skipped_steps=totals.skipped_steps,
            seconds_left=self._seconds / (step - self._first_step) * (self._steps - step),
        )
        self._timed, self.logged = totals, totals
        self._log(describe(self.last, self._steps))
        self._write(self._sinks, dataclasses.asdict(self.last))

    def evaluated(self, step: int, evaluation: Evaluation, baseline: float | None, *, averaged: bool) -> None:
        """Tell of an evaluation, of the averaged weights or of the present ones."""
        self._log(describe_evaluation(step, self._steps, evaluation, baseline, averaged=averaged))
        values = {f"eval_{key}": value for key, value in dataclasses.asdict(evaluation).items()}
        self._write(self._sinks, {"step": step} | values)

    def sampled(self, step: int, sample: Sample) -> None:
        """Tell of a sample."""
        self._log(describe_sample(step, self._steps, sample))
        self._write(self._samples, {"step": step} | dataclasses.asdict(sample))

    def layer_statistics(self, records: Iterable[dict[str, Any]]) -> None:
        """Keep the norms of the layers, of which a log line has no room to tell."""
        for record in records:
            self._write(self._sinks, record)

    def close(self) -> None:
        """Close all sinks."""
        for sinks in self._sinks, self._samples:
            while sinks:
                self._end(sinks.pop())

    def draw(self) -> None:
        """Draw the loss curve; whatever is wrong with matplotlib or the file is told, and fails no run."""
        if not self._ranks.is_main:
            return
        try:
            plot_losses(self._out / "metrics.jsonl", self._out / "losses.png")
        except Exception as error:
            self._log(f"losses.png was not drawn: {' '.join(str(error).split())}")

    def _write(self, sinks: list[Sink], record: dict[str, Any]) -> None:
        """Append to every sink; where one fails, the run, whose checkpoints may go elsewhere, goes on without it."""
        for sink in list(sinks):
            try:
                sink.write(record)
            except Exception as error:  # a tracker's library raises what it likes
                self._log(f"{sink.name} ends here: {reason(error)}; training goes on without it")
                sinks.remove(sink)
                self._end(sink)

    def _end(self, sink: Sink) -> None:
        try:
            sink.close()
        except Exception as error:
            self._log(f"the end of {sink.name} may be missing: {reason(error)}")
