"""The training loop, for any model and loader that keep the protocols of `protocols.py`.

The loss of a step is the sum of token losses over all batches and ranks divided by their number of valid tokens, so an
accumulation of any shape equals one big batch (`update.py`). The host waits for the device at log lines alone.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastlm.evaluate import Evaluation, evaluate
from fastlm.train import checkpoint, distributed, precision, random_state
from fastlm.train.config import TrainConfig
from fastlm.train.interruption import Interruption
from fastlm.train.optimizer import load_state_tensors, state_tensors
from fastlm.train.progress import count
from fastlm.train.protocols import Batch, Loader, as_trainable
from fastlm.train.run_lock import locked
from fastlm.train.run_log import RunLog
from fastlm.train.schedule import learning_rate
from fastlm.train.update import Totals, Updater


class DivergedError(ValueError):
    """Losses or gradients stopped being finite."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Where a call of fit ended."""

    step: int
    num_tokens: int  # valid tokens since the start of the run
    skipped_steps: int  # since the start of the run
    loss: float | None  # of the last log line of this call
    evaluation: Evaluation | None  # the last of this call
    checkpoint: Path
    stopped_by: str | None  # name of the signal that ended training early


class Trainer:
    """Trains model as config says, resuming from the newest undamaged checkpoint in config.out.

    metadata     facts that a resumed run must share, such as the model's config and the tokenizer's hash
    eval_loader  iterated from its beginning at each evaluation
    eval_bytes   UTF-8 bytes of the text in eval_loader, over all ranks, for bits per byte
    baseline     bits per byte of a trivial model, shown beside the model's own
    on_line      receives every line meant for the user, on rank 0 alone
    on_step      receives the number of steps done after each, on rank 0 alone

    Raises OSError if config.out cannot be written, CheckpointError if it holds a run with other metadata, ValueError if
    the device or precision is not to be had, TypeError if the model lacks what `protocols.py` asks of it.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        train_loader: Loader,
        eval_loader: Iterable[Batch] | None = None,
        *,
        metadata: dict[str, Any] | None = None,
        eval_bytes: int | None = None,
        baseline: float | None = None,
        on_line: Callable[[str], None] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        self.config, self.train_loader, self.eval_loader = config, train_loader, eval_loader
        self.eval_bytes, self.baseline = eval_bytes, baseline
        self.ranks = distributed.connect()
        self.metadata = (metadata or {}) | {"world_size": self.ranks.world_size}
        self._say = on_line if on_line and self.ranks.is_main else lambda line: None
        self._on_step = on_step if on_step and self.ranks.is_main else lambda step: None
        self.arithmetic = precision.choose(config, self.ranks.local_rank)
        with self.ranks.together():
            if self.ranks.is_main:
                checkpoint.prepare(config.out)
                checkpoint.check_metadata(config.out, self.metadata)
        self.model = model.to(self.arithmetic.device)
        self.updater = Updater(self.model, config, self.arithmetic, self.ranks)
        self.step = 0
        self.evaluation: Evaluation | None = None
        self._reported = Totals()
        self._evaluated_at = self._saved_at = -1

    def fit(self) -> TrainResult:
        """Train until config.steps, or until SIGINT, SIGTERM or SIGUSR1; either way it ends with a checkpoint.

        Raises CheckpointError if no checkpoint in config.out is sound or one does not fit the model, DivergedError
        after config.max_skipped_steps steps in a row without a finite loss and gradient, OSError if a checkpoint cannot
        be written or another process trains in config.out.
        """
        with contextlib.ExitStack() as stack:
            with self.ranks.together():
                if self.ranks.is_main:
                    stack.enter_context(locked(self.config.out))
            return self._fit()

    def _fit(self) -> TrainResult:
        self._start()
        log = RunLog(
            self.config,
            self.arithmetic,
            self.ranks,
            self._say,
            first_step=self.step,
            totals=self.updater.totals,
            reported=self._reported,
        )
        try:
            with Interruption() as interruption:
                stopped_by = self._loop(log, interruption)
        finally:
            log.close()
        log.draw()
        totals = self.updater.totals
        return TrainResult(
            step=self.step,
            num_tokens=totals.num_tokens,
            skipped_steps=totals.skipped_steps,
            loss=log.last.loss if log.last else None,
            evaluation=self.evaluation,
            checkpoint=checkpoint.path_of(self.config.out, self._saved_at),
            stopped_by=stopped_by,
        )

    def _start(self) -> None:
        self.arithmetic.apply()
        num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self._say(f"training {count(num_parameters)} parameters in {self.arithmetic}")
        random_state.seed_everything(self.config.seed + self.ranks.rank)
        self._resume()
        with self.ranks.together():
            checkpoint.require_space(self.config.out, 3 * 4 * num_parameters)  # weights and AdamW's two averages
        if self.config.compile:
            self.model.compile()

    def _loop(self, log: RunLog, interruption: Interruption) -> str | None:
        """Steps, and what is due after each; the signal that ended them early, if any."""
        config = self.config
        while self.step < config.steps:
            batches = [next(self.train_loader) for _ in range(config.accumulation)]
            self.updater.update(batches, learning_rate(self.step, config))
            self.step += 1
            stopped_by = self._agree_to_stop(interruption)
            last = stopped_by is not None or self.step == config.steps
            if self.step in (1, config.steps) or _due(self.step, config.log_interval):
                self._report(log, sequence_length=batches[0].tokens.shape[1])
            with log.paused():
                if self.step == config.steps or _due(self.step, config.eval_interval):
                    self._evaluate(log)
                if last or _due(self.step, config.checkpoint_interval):
                    self._save(log.reported)
            self._on_step(self.step)
            if stopped_by:
                self._say(f"stopped by {stopped_by} after step {self.step}; the same command resumes from there")
                return stopped_by
        return None

    def _agree_to_stop(self, interruption: Interruption) -> str | None:
        """The signal that any rank got: all stop after the same step, else the others would wait for it for ever."""
        if int(self.ranks.sum(torch.tensor(int(interruption.requested is not None)))) == 0:
            return None
        return interruption.requested or "a signal to another rank"

    def _report(self, log: RunLog, sequence_length: int) -> None:
        totals = self.updater.totals
        log.report(
            self.step,
            totals,
            grad_norm=self.updater.grad_norm,
            learning_rate=learning_rate(self.step - 1, self.config),
            flops_per_token=as_trainable(self.model).flops_per_token(sequence_length),
        )
        if totals.skipped_in_a_row >= self.config.max_skipped_steps:
            raise DivergedError(
                f"the last {totals.skipped_in_a_row} steps up to step {self.step} had no finite loss and gradient and "
                f"changed nothing: lower learning_rate ({self.config.learning_rate:g}), or check the data"
            )

    def _evaluate(self, log: RunLog) -> None:
        if self.eval_loader is None:
            return
        num_bytes = self.eval_bytes if self.config.eval_batches is None else None  # of the whole held-out text
        with self.arithmetic.autocast():
            batches = islice(self.eval_loader, self.config.eval_batches)
            self.evaluation = evaluate(self.model, batches, num_bytes=num_bytes, reduce=self.ranks.sum)
        self._evaluated_at = self.step
        log.evaluated(self.step, self.evaluation, self.baseline)

    # Saving and resuming

    def _save(self, reported: Totals) -> None:
        evaluated = self.evaluation is not None and self._evaluated_at == self.step
        checkpoint.write(
            self.config.out,
            self.step,
            model=self.model.state_dict(),
            optimizer=state_tensors(self.updater.optimizer, self.model),
            state={
                "metadata": self.metadata,
                "config": self.config.as_dict(),
                "totals": dataclasses.asdict(self.updater.totals),
                "reported": dataclasses.asdict(reported),
                "scaler": self.updater.scaler.state_dict(),
                "eval_loss": self.evaluation.loss if self.evaluation and evaluated else None,
            },
            rank_state={
                "random": random_state.capture(self.arithmetic.device),
                "loader": self.train_loader.state_dict(),
                "threads": torch.get_num_threads(),
            },
            ranks=self.ranks,
        )
        self._saved_at = self.step
        if self.ranks.is_main:
            checkpoint.retain(self.config.out, self.config.keep_checkpoints)

    def _resume(self) -> None:
        """Continue from the newest undamaged checkpoint, if there is any: everything that the next step depends on."""
        saved = self._newest_checkpoint()
        if saved is None:
            return
        try:
            self.model.load_state_dict(saved.model)
            load_state_tensors(self.updater.optimizer, self.model, saved.optimizer)
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise checkpoint.CheckpointError(f"{saved.path} does not fit this model: {reason}") from error
        try:
            self._resume_state(saved)
        except (KeyError, TypeError) as error:
            raise checkpoint.CheckpointError(f"{saved.path} is not one that this trainer writes: {error}") from error
        self._announce(saved)

    def _resume_state(self, saved: checkpoint.Checkpoint) -> None:
        if saved.state["scaler"]:  # empty if that run was not in fp16
            self.updater.scaler.load_state_dict(saved.state["scaler"])
        self.updater.totals = Totals(**saved.state["totals"])
        self._reported = Totals(**saved.state["reported"])
        self.train_loader.load_state_dict(saved.rank_state["loader"])
        random_state.restore(saved.rank_state["random"], self.arithmetic.device)
        self.step = self._saved_at = saved.state["step"]

    def _newest_checkpoint(self) -> checkpoint.Checkpoint | None:
        """Rank 0 chooses, and the others read the same step."""
        saved = None
        with self.ranks.together():
            if self.ranks.is_main:
                saved = checkpoint.read_newest(self.config.out, on_line=self._say)
        step = int(self.ranks.sum(torch.tensor(saved.state["step"] if saved else 0)))
        if step and not self.ranks.is_main:
            saved = checkpoint.read(checkpoint.path_of(self.config.out, step), rank=self.ranks.rank)
        return saved

    def _announce(self, saved: checkpoint.Checkpoint) -> None:
        ended = "" if self.step < self.config.steps else f", which is all of the {self.config.steps} steps asked for"
        self._say(f"resumed from {saved.path}{ended}")
        threads, now = saved.rank_state["threads"], torch.get_num_threads()
        if threads != now:
            self._say(f"this run has {now} CPU threads and had {threads}: results are no longer equal to the last bit")
        changes = checkpoint.differences(saved.state["config"], self.config.as_dict())
        if told := [f"{key} {was} -> {value}" for key, was, value in changes if key != "out"]:
            self._say(f"changed since then: {', '.join(told)}")


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
