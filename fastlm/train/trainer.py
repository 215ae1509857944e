"""The training loop, for any model and loader that keep the protocols of `protocols.py`.

The loss of a step is the sum of token losses over all batches and ranks divided by their number of valid tokens, so an
accumulation of any shape equals one big batch (`update.py`). The host waits for the device at log lines alone.
"""

import contextlib
import dataclasses
import gc
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from fastlm.evaluation import Evaluation, evaluate, in_eval_mode
from fastlm.train import checkpoint, distributed, random_state, run_start
from fastlm.train.config import TrainConfig
from fastlm.train.early_stopping import EarlyStopping
from fastlm.train.ema import Ema
from fastlm.train.interruption import SIGNALS, Interruption
from fastlm.train.kept_memory import kept_memory
from fastlm.train.layer_statistics import LayerStatistics
from fastlm.train.memory import StepMemory
from fastlm.train.optimizers import Optimizers
from fastlm.train.parallelize import Buffers, naming_compiler_failures, parallelize
from fastlm.train.precision import choose_precision
from fastlm.train.prefetch import Prefetcher, prefetched
from fastlm.train.profiling import Profiler
from fastlm.train.progress import Sample, count
from fastlm.train.protocols import Batch, Loader, check_loaders, check_model, flops_per_token, num_parameters
from fastlm.train.run_facts import run_facts, write_facts
from fastlm.train.run_lock import locked
from fastlm.train.run_log import RunLog
from fastlm.train.run_state import RunState, one_line
from fastlm.train.schedule import learning_rate
from fastlm.train.sinks import Sink, TrackedRun, open_sinks
from fastlm.train.update import Updater

CLOSED_PIPE, EARLY_STOPPING, DIVERGENCE = "a closed pipe", "early stopping", "divergence"


class DivergedError(ValueError):
    """Losses or gradients stopped being finite."""


class _Stopped(Exception):  # noqa: N818  no failure
    """An evaluation is broken off."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Where a call of fit ended."""

    step: int
    num_tokens: int  # valid tokens since the start of the run
    skipped_steps: int  # since the start of the run
    loss: float | None  # of the last log line of this call
    evaluation: Evaluation | None  # the last of this call
    checkpoint: Path
    stopped_by: str | None  # what ended training early: a signal to whichever rank, CLOSED_PIPE or EARLY_STOPPING


class Trainer:
    """Trains model as config says, resuming from the newest undamaged checkpoint in config.out.

    metadata     facts that a resumed run must share, such as the model's config and the tokenizer's hash
    eval_loader  iterated from its beginning at each evaluation
    eval_bytes   UTF-8 bytes of the text in eval_loader, over all ranks, for bits per byte
    baseline     bits per byte of a trivial model, shown beside the model's own
    on_log       receives every line meant for the user, on rank 0 alone; BrokenPipeError from it stops training as a
                 signal does, any other OSError is passed over: a line that nobody can read fails no run
    on_step      receives the number of steps done after each, on rank 0 alone
    on_evaluate  receives the step after each evaluation, on every rank, with the model in evaluation mode; the Sample
                 that it may return is shown and kept in samples.jsonl; random numbers that it draws are not missed, and
                 its failure fails no run
    on_line      the former name of on_log, until the first release

    Raises OSError if config.out cannot be written, CheckpointError if it holds a run with other metadata or one that
    config.resume or config.init_from does not mean, ValueError if the device or precision is not to be had, if no
    optimiser can update a parameter, FSDP cannot share the model out or early stopping has nothing to go by, TypeError
    if the model or a loader lacks what `protocols.py` asks of it.
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
        on_log: Callable[[str], None] | None = None,
        on_step: Callable[[int], None] | None = None,
        on_evaluate: Callable[[int], Sample | None] | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> None:
        check_model(model)
        if not isinstance(config, TrainConfig):
            raise TypeError(f"Trainer: config is of type {type(config).__name__}, expected fastlm.TrainConfig(...)")
        check_loaders(train_loader, eval_loader)
        if on_line is not None:
            warnings.warn("Trainer: on_line is called on_log now", DeprecationWarning, stacklevel=2)
            on_log = on_log or on_line
        self.config, self.eval_loader = config, eval_loader
        self.train_loader = prefetched(train_loader, config.prefetch)
        packing = getattr(train_loader, "report", None)
        self._packing = None if callable(packing) else packing  # anybody's loader may have a method of that name
        self.eval_bytes, self.baseline = eval_bytes, baseline
        if config.early_stopping_patience and eval_loader is None:
            raise ValueError("early_stopping_patience needs a held-out loss: give an eval_loader, or set it to 0")
        self.early_stopping = EarlyStopping(config)
        self.ranks = distributed.connect()
        self.metadata = metadata or {}
        self._on_log = on_log if on_log and self.ranks.is_main else lambda line: None
        self._on_step = on_step if on_step and self.ranks.is_main else lambda step: None
        self._on_evaluate = on_evaluate
        self.precision = choose_precision(config, self.ranks.local_rank, num_parameters(model))
        with self.ranks.aware_of_peers():
            with self.ranks.fail_together():
                if self.ranks.is_main:
                    checkpoint.prepare(config.out)
                    run_start.check_metadata(config.out, self.metadata)
                    self._check_start()
            if missing := [name for name, tensor in model.state_dict().items() if getattr(tensor, "is_meta", False)]:
                raise ValueError(
                    f"{missing[0]} of the model is on the meta device, without values: build it on another"
                )
            self.model = model.to(self.precision.device)
            has_masters = self.precision.has_masters
            forward = parallelize(self.model, config, self.precision.device, self.ranks, has_masters=has_masters)
            optimizers = Optimizers(self.model, config, with_masters=has_masters)
            self.ema = Ema(self.model, optimizers.leaves, config.ema_decay) if config.ema_decay else None
            self.updater = Updater(forward, optimizers, config, self.precision, self.ranks, self.ema)
            self.memory = StepMemory(self.model, optimizers, config, self.precision, self.ranks)
        self._buffers = Buffers(self.model, self.ranks)
        self._layer_statistics = LayerStatistics(optimizers.leaves, self.ranks, config)
        num_profiled = config.profile_steps if self.ranks.is_main else 0
        self._profiler = Profiler(num_profiled, config.out, self.precision.device, self.log)
        self._state = RunState(
            self.model, self.updater, self.train_loader, self.early_stopping, config, self.metadata, self.log
        )
        self.evaluation: Evaluation | None = None
        self._nobody_listens = False

    @property
    def step(self) -> int:
        """Steps done."""
        return self._state.step

    def _check_start(self) -> None:
        run_start.check_start(self.config.out, self.config, self.metadata, restarts=self.ranks.restarts)

    def log(self, line: str) -> None:
        """Tell the user; where the pipe is closed, training stops after the next step."""
        try:
            self._on_log(line)
        except BrokenPipeError:
            self._nobody_listens = True
        except OSError:
            pass  # a full disk or a terminal that is gone: whoever asked for training still wants it

    def fit(self) -> TrainResult:
        """Train until config.steps, or until SIGINT, SIGTERM, SIGUSR1 or SIGHUP; either way it ends with a checkpoint.

        Raises CheckpointError if no checkpoint in config.out is sound, one does not fit the model, or the model has a
        state that none can hold, DivergedError after config.max_skipped_steps steps in a row without a finite loss and
        gradient, OSError if the last checkpoint cannot be written or another process trains in config.out,
        CompilationError if torch.compile fails, OutOfMemoryError if a step does not fit, PeerError if another rank
        fails.
        """
        with contextlib.ExitStack() as stack, self.ranks.aware_of_peers():
            with self.ranks.fail_together():
                if self.ranks.is_main:
                    stack.enter_context(locked(self.config.out))
                    if (
                        self._state.saved == self.config.out
                    ):  # another run may have begun there since this trainer was made
                        self._check_start()
            with naming_compiler_failures(self.config):
                return self._fit()

    def _fit(self) -> TrainResult:
        self._start()
        with self.ranks.fail_together():
            run_log = self._open_log()
        try:
            with (
                Interruption() as interruption,
                # The inner one, though fit has one: torchrun sends SIGTERM at once, and a message is yet to be made
                self.ranks.aware_of_peers(),
                garbage_collected_between_steps(),
                kept_memory(self.precision.device, self.config.keep_memory),
            ):
                stopped_by = self._loop(run_log, interruption)
        finally:
            self._profiler.close(self.step)
            run_log.close()
            if isinstance(self.train_loader, Prefetcher):
                self.train_loader.close()
        run_log.draw()
        totals = self.updater.totals
        return TrainResult(
            step=self.step,
            num_tokens=totals.num_tokens,
            skipped_steps=totals.skipped_steps,
            loss=run_log.last.loss if run_log.last else None,
            evaluation=self.evaluation,
            checkpoint=self._state.saved,
            stopped_by=stopped_by,
        )

    def _start(self) -> None:
        self.precision.apply()
        self.log(f"training {count(num_parameters(self.model))} parameters in {self.precision}")
        random_state.seed_everything(self.config.seed + self.ranks.rank)
        self._state.start()

    def _open_log(self) -> RunLog:
        """Write run.json, and open metrics.jsonl and what else the config asks for."""
        config = self.config
        sinks: list[Sink] = []
        if self.ranks.is_main:
            facts = run_facts(
                config,
                self.model,
                self.precision,
                metadata=self.metadata,
                world_size=self.ranks.world_size,
                packing=self._packing,
                baseline=self.baseline,
                first_step=self.step,
            )
            write_facts(config.out, facts)
            with random_state.preserved(self.precision.device):  # a tracker's library may draw a name from them
                sinks = open_sinks(config.log_to, TrackedRun(config.out, facts, self.step), self.log)
        return RunLog(
            config.out,
            config.steps,
            self.precision,
            self.ranks,
            self.log,
            first_step=self.step,
            totals=self.updater.totals,
            logged=self._state.logged,
            sinks=sinks,
            samples=self._on_evaluate is not None,
        )

    def _loop(self, run_log: RunLog, interruption: Interruption) -> str | None:
        """Steps, and what is due after each; what ended them before the last, if anything did."""
        config = self.config
        if self._state.evaluation_is_due:  # a signal came before its end
            if stopped_by := self._evaluate(run_log, interruption):
                return self._stopped(stopped_by)
            self._state.save(last=self.step == config.steps)
        while self.step < config.steps:
            if self.early_stopping.is_due:
                self.log(self.early_stopping.describe(self.step))
                return EARLY_STOPPING
            batches = self._next_batches()
            around = self._layer_statistics.around(self.step + 1)
            with self.memory.of_step(self.step + 1, batches[0], self.log), _naming_the_ids(batches):
                self.updater.update(batches, learning_rate(self.step, config), around=around)
            self._buffers.agree()
            self._state.step_done(evaluation_is_due=self._evaluates_after(self.step + 1))
            stopped_by = self._agree_to_stop(interruption)
            if self.step in (1, config.steps) or _due(self.step, config.log_interval):
                self._report(run_log, batches)
                gc.collect()
            self._profiler.step_done(self.step)
            stopped_by = stopped_by or self._evaluate(run_log, interruption)
            if stopped_by == DIVERGENCE:
                raise self._diverged(batches)
            last = stopped_by is not None or self.step == config.steps
            if last or self.early_stopping.is_due or _due(self.step, config.checkpoint_interval):
                with run_log.paused():
                    run_log.layer_statistics(self._layer_statistics.take())  # a resumed run would not have them
                    self._state.save(last=last or self.early_stopping.is_due)
            self._on_step(self.step)
            if stopped_by:
                return self._stopped(stopped_by)
        return None

    def _stopped(self, stopped_by: str) -> str:
        evaluation = ", with the evaluation of that step" if self._state.evaluation_is_due else ""
        self.log(f"stopped by {stopped_by} after step {self.step}; the same command resumes from there{evaluation}")
        return stopped_by

    def _evaluates_after(self, step: int) -> bool:
        is_due = step == self.config.steps or _due(step, self.config.eval_interval)
        return is_due and self.eval_loader is not None

    def _next_batches(self) -> list[Batch]:
        """Those of the next step."""
        try:
            with self._saving_what_was_done():
                return [next(self.train_loader) for _ in range(self.config.grad_accumulation_steps)]
        except StopIteration:
            raise ValueError(
                f"the loader has no batch for step {self.step + 1} of {self.config.steps}: expected one that never ends"
            ) from None

    @contextlib.contextmanager
    def _saving_what_was_done(self) -> Iterator[None]:
        """Run a block between two steps; where it fails, the steps since the last checkpoint are not lost with it.

        Of several ranks one may fail alone, and none can save without the others.
        """
        try:
            yield
        except Exception:
            if self.ranks.world_size == 1 and not self._state.is_saved:
                self._state.save(last=False)
            raise

    def _agree_to_stop(self, interruption: Interruption) -> str | None:
        """What asked any rank to stop: all stop after the same step, else the others would wait for it for ever."""
        has_diverged = self.updater.skipped_in_a_row.value >= self.config.max_skipped_steps
        requested = (
            interruption.requested
            or (CLOSED_PIPE if self._nobody_listens else None)
            or (DIVERGENCE if has_diverged else None)
        )
        reasons = (*SIGNALS, CLOSED_PIPE, DIVERGENCE)
        asked = self.ranks.sum(torch.tensor([int(reason == requested) for reason in reasons]))
        return next((reason for reason, ranks in zip(reasons, asked.tolist(), strict=True) if ranks), None)

    def _report(self, run_log: RunLog, batches: list[Batch]) -> None:
        totals = self.updater.totals
        run_log.layer_statistics(self._layer_statistics.take())
        run_log.report(
            self.step,
            totals,
            grad_norm=self.updater.grad_norm,
            learning_rate=learning_rate(self.step - 1, self.config),
            flops_per_token=flops_per_token(self.model, T=batches[0].tokens.shape[1]),
        )
        self._state.logged = run_log.logged
        if totals.skipped_in_a_row >= self.config.max_skipped_steps:
            raise self._diverged(batches)

    def _diverged(self, batches: list[Batch]) -> DivergedError:
        return DivergedError(
            f"the last {self.updater.totals.skipped_in_a_row} steps up to step {self.step} had no finite loss and "
            f"gradient, or were outliers, and changed nothing: lower learning_rate ({self.config.learning_rate:g}), or "
            f"check the data; {self._keep(batches)}"
        )

    def _keep(self, batches: list[Batch]) -> str:
        """Write the batches of this step to a file, for whoever looks for the cause; says where they are."""
        names = ("tokens", "targets", "positions", "cu_seqlens")
        tensors = {f"{i}.{name}": getattr(batch, name).clone() for i, batch in enumerate(batches) for name in names}
        path = self.config.out / f"diverged-step-{self.step}-rank-{self.ranks.rank}.safetensors"
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        except (OSError, SafetensorError) as error:
            return f"the last batch could not be kept: {one_line(error)}"
        return f"the last batch is in {path}"

    def _evaluate(self, run_log: RunLog, interruption: Interruption) -> str | None:
        """Evaluate if it is due. What broke it off, if anything did: then it stays due."""
        if not self._state.evaluation_is_due or self.eval_loader is None:
            return None
        num_bytes = self.eval_bytes if self.config.eval_batches is None else None  # of the whole held-out text
        with run_log.paused(), self._saving_what_was_done():
            try:
                with self.precision.autocast(), self._averaged():
                    batches = self._held_out_batches(interruption)
                    self.evaluation = evaluate(self.model, batches, num_bytes=num_bytes, reduce=self.ranks.sum)
            except _Stopped as stop:
                return stop.reason
            self._state.evaluated(self.evaluation.loss)
            self.early_stopping.observe(self.step, self.evaluation.loss)
            run_log.evaluated(self.step, self.evaluation, self.baseline, averaged=self.ema is not None)
            self._sample(run_log)
        return None

    def _held_out_batches(self, interruption: Interruption) -> Iterator[Batch]:
        """Those of this rank; raises _Stopped, on all ranks before the same batch, where any is asked to stop."""
        assert self.eval_loader is not None
        batches = islice(self.eval_loader, self.config.eval_batches)
        # where ranks share the model out, the forward pass of each waits for the others
        for batch in self.ranks.in_step(batches, equally_many=self.updater.optimizers.leaves.are_sharded):
            if reason := self._agree_to_stop(interruption):
                raise _Stopped(reason)
            if batch is not None:
                yield batch

    def _sample(self, run_log: RunLog) -> None:
        """Tell what on_evaluate makes of the model, and train on as if it had not been called."""
        if self._on_evaluate is None:
            return
        try:
            with random_state.preserved(self.precision.device), self._averaged(), in_eval_mode(self.model):
                sample = self._on_evaluate(self.step)
        except Exception as error:  # it is the user's, and the model may be in no state to be sampled from
            self.log(f"no sample at step {self.step}: {one_line(error)}")
        else:
            if sample is not None:
                run_log.sampled(self.step, sample)

    def _averaged(self) -> AbstractContextManager[None]:
        """A context in which the model has its averaged weights, if they are averaged."""
        return self.ema.in_place() if self.ema else contextlib.nullcontext()


@contextlib.contextmanager
def garbage_collected_between_steps() -> Iterator[None]:
    """Keep Python from searching all objects for cycles within a step, where on many ranks all wait for the one."""
    was_enabled = gc.isenabled()
    gc.freeze()  # what lives now, PyTorch above all, is looked through no more
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def _naming_the_ids(batches: list[Batch]) -> Iterator[None]:
    """Tell what a model was asked to look up where PyTorch only says that it is not there."""
    try:
        yield
    except IndexError as error:
        ids = [int(value) for batch in batches for value in (batch.tokens.max(), batch.targets.max())]
        raise ValueError(
            f"the model has no row for what it was to look up ({one_line(error)}): the ids of the batch go up to "
            f"{max(ids)} and its rows have {batches[0].tokens.shape[1]} tokens; expected a model with a larger "
            "vocabulary, or one that takes longer rows"
        ) from error


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
