"""The training loop, for any model and loader that keep the protocols of `protocols.py`.

The loss of a step is the sum of token losses over all batches and ranks divided by their number of valid tokens, so an
accumulation of any shape equals one big batch (`update.py`). The host waits for the device at log lines alone.
"""

import contextlib
import dataclasses
import gc
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from fastlm.evaluation import Evaluation, evaluate, in_eval_mode
from fastlm.train import checkpoint, distributed, random_state
from fastlm.train.config import TrainConfig
from fastlm.train.early_stopping import EarlyStopping
from fastlm.train.ema import Ema
from fastlm.train.interruption import SIGNALS, Interruption
from fastlm.train.layer_statistics import LayerStatistics
from fastlm.train.memory import StepMemory
from fastlm.train.optimizers import Optimizers
from fastlm.train.parallelize import Buffers, parallelize
from fastlm.train.precision import choose_precision
from fastlm.train.prefetch import Prefetcher, prefetched
from fastlm.train.profiling import Profiler
from fastlm.train.progress import Sample, count
from fastlm.train.protocols import Batch, Loader, check_model, flops_per_token
from fastlm.train.run_facts import run_facts, write_facts
from fastlm.train.run_lock import locked
from fastlm.train.run_log import RunLog
from fastlm.train.schedule import learning_rate
from fastlm.train.shards import sharded_parameters
from fastlm.train.sinks import Sink, TrackedRun, open_sinks
from fastlm.train.update import Totals, Updater

CLOSED_PIPE, EARLY_STOPPING = "a closed pipe", "early stopping"


class DivergedError(ValueError):
    """Losses or gradients stopped being finite."""


class CompilationError(OSError, RuntimeError):
    """torch.compile did not work on this machine: it has no compiler, say."""


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
    if the model lacks what `protocols.py` asks of it.
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
        _check_repeatable(eval_loader)
        self.ranks = distributed.connect()
        self.metadata = metadata or {}
        self._on_log = on_log if on_log and self.ranks.is_main else lambda line: None
        self._on_step = on_step if on_step and self.ranks.is_main else lambda step: None
        self._on_evaluate = on_evaluate
        self.precision = choose_precision(config, self.ranks.local_rank)
        with self.ranks.aware_of_peers():
            with self.ranks.fail_together():
                if self.ranks.is_main:
                    checkpoint.prepare(config.out)
                    checkpoint.check_metadata(config.out, self.metadata)
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
        self.step = 0
        self.evaluation: Evaluation | None = None
        self._logged = Totals()
        self._evaluated_at = -1
        self._saved = config.out
        self._nobody_listens = False

    def _check_start(self) -> None:
        checkpoint.check_start(self.config.out, self.config, self.metadata, restarts=self.ranks.restarts)

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
                    if self._saved == self.config.out:  # another run may have begun there since this trainer was made
                        self._check_start()
            with self._aware_of_compiler():
                return self._fit()

    @contextlib.contextmanager
    def _aware_of_compiler(self) -> Iterator[None]:
        """Tell a failure of torch.compile from a failure of training."""
        try:
            yield
        except RuntimeError as error:
            if not self.config.compile or not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise
            reason = textwrap.shorten(str(error), 400, placeholder=" ...")  # it may hold a compiler's whole output
            raise CompilationError(
                f"torch.compile failed: {reason}; train without compile, or install what it asks for; the checkpoints "
                "are unharmed"
            ) from error

    def _fit(self) -> TrainResult:
        self._start()
        with self.ranks.fail_together():
            run_log = self._open_log()
        try:
            # The inner one, though fit has one: torchrun sends SIGTERM at once, and a message is yet to be made
            with Interruption() as interruption, self.ranks.aware_of_peers(), garbage_collected_between_steps():
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
            checkpoint=self._saved,
            stopped_by=stopped_by,
        )

    def _start(self) -> None:
        self.precision.apply()
        num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.log(f"training {count(num_parameters)} parameters in {self.precision}")
        random_state.seed_everything(self.config.seed + self.ranks.rank)
        saved = self._starting_point()
        with self.ranks.fail_together():
            self._resume(saved) if saved else self._begin()
            ema_bytes = sum(leaf.nbytes for _, leaf in self.updater.optimizers.leaves.items()) if self.ema else 0
            weight_bytes = sum(parameter.nbytes for parameter in self.model.parameters())
            checkpoint.require_space(self.config.out, weight_bytes + self.updater.optimizers.nbytes + ema_bytes)

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
            logged=self._logged,
            sinks=sinks,
            samples=self._on_evaluate is not None,
        )

    def _loop(self, run_log: RunLog, interruption: Interruption) -> str | None:
        """Steps, and what is due after each; what ended them before the last, if anything did."""
        config = self.config
        while self.step < config.steps:
            if self.early_stopping.is_due:
                self.log(self.early_stopping.describe(self.step))
                return EARLY_STOPPING
            batches = self._next_batches(run_log)
            around = self._layer_statistics.around(self.step + 1)
            with self.memory.of_step(self.step + 1, batches[0], self.log), _naming_the_ids(batches):
                self.updater.update(batches, learning_rate(self.step, config), around=around)
            self._buffers.agree()
            self.step += 1
            stopped_by = self._agree_to_stop(interruption)
            last = stopped_by is not None or self.step == config.steps
            if self.step in (1, config.steps) or _due(self.step, config.log_interval):
                self._report(run_log, batches)
                gc.collect()
            self._profiler.step_done(self.step)
            if self.step == config.steps or _due(self.step, config.eval_interval):
                with run_log.paused(), self._saving_what_was_done(run_log):
                    self._evaluate(run_log)
            if last or self.early_stopping.is_due or _due(self.step, config.checkpoint_interval):
                with run_log.paused():
                    run_log.layer_statistics(self._layer_statistics.take())  # a resumed run would not have them
                    self._save(run_log.logged, last=last or self.early_stopping.is_due)
            self._on_step(self.step)
            if stopped_by:
                self.log(f"stopped by {stopped_by} after step {self.step}; the same command resumes from there")
                return stopped_by
        return None

    def _next_batches(self, run_log: RunLog) -> list[Batch]:
        """Those of the next step."""
        try:
            with self._saving_what_was_done(run_log):
                return [next(self.train_loader) for _ in range(self.config.grad_accumulation_steps)]
        except StopIteration:
            raise ValueError(
                f"the loader has no batch for step {self.step + 1} of {self.config.steps}: expected one that never ends"
            ) from None

    @contextlib.contextmanager
    def _saving_what_was_done(self, run_log: RunLog) -> Iterator[None]:
        """Run a block between two steps; where it fails, the steps since the last checkpoint are not lost with it.

        Of several ranks one may fail alone, and none can save without the others.
        """
        try:
            yield
        except Exception:
            if (
                self.ranks.world_size == 1
                and self._saved != checkpoint.path_of(self.config.out, self.step)
                and self.step
            ):
                self._save(run_log.logged, last=False)
            raise

    def _agree_to_stop(self, interruption: Interruption) -> str | None:
        """What asked any rank to stop: all stop after the same step, else the others would wait for it for ever."""
        requested = interruption.requested or (CLOSED_PIPE if self._nobody_listens else None)
        reasons = (*SIGNALS, CLOSED_PIPE)
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
        if totals.skipped_in_a_row >= self.config.max_skipped_steps:
            raise DivergedError(
                f"the last {totals.skipped_in_a_row} steps up to step {self.step} had no finite loss and gradient, or "
                f"were outliers, and changed nothing: lower learning_rate ({self.config.learning_rate:g}), or check "
                f"the data; {self._keep(batches)}"
            )

    def _keep(self, batches: list[Batch]) -> str:
        """Write the batches of this step to a file, for whoever looks for the cause; says where they are."""
        names = ("tokens", "targets", "positions", "cu_seqlens")
        tensors = {f"{i}.{name}": getattr(batch, name).clone() for i, batch in enumerate(batches) for name in names}
        path = self.config.out / f"diverged-step-{self.step}-rank-{self.ranks.rank}.safetensors"
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        except (OSError, SafetensorError) as error:
            return f"the last batch could not be kept: {_one_line(error)}"
        return f"the last batch is in {path}"

    def _evaluate(self, run_log: RunLog) -> None:
        if self.eval_loader is None:
            return
        num_bytes = self.eval_bytes if self.config.eval_batches is None else None  # of the whole held-out text
        with self.precision.autocast(), self._averaged():
            batches: Iterable[Batch] = islice(self.eval_loader, self.config.eval_batches)
            if self.updater.optimizers.leaves.are_sharded:  # whose forward pass waits for the other ranks
                batches = self.ranks.in_step(batches)
            self.evaluation = evaluate(self.model, batches, num_bytes=num_bytes, reduce=self.ranks.sum)
        self._evaluated_at = self.step
        self.early_stopping.observe(self.step, self.evaluation.loss)
        run_log.evaluated(self.step, self.evaluation, self.baseline, averaged=self.ema is not None)
        self._sample(run_log)

    def _sample(self, run_log: RunLog) -> None:
        """Tell what on_evaluate makes of the model, and train on as if it had not been called."""
        if self._on_evaluate is None:
            return
        try:
            with random_state.preserved(self.precision.device), self._averaged(), in_eval_mode(self.model):
                sample = self._on_evaluate(self.step)
        except Exception as error:  # it is the user's, and the model may be in no state to be sampled from
            self.log(f"no sample at step {self.step}: {_one_line(error)}")
        else:
            if sample is not None:
                run_log.sampled(self.step, sample)

    def _averaged(self) -> AbstractContextManager[None]:
        """A context in which the model has its averaged weights, if they are averaged."""
        return self.ema.in_place() if self.ema else contextlib.nullcontext()

    # Saving and resuming

    def _save(self, logged: Totals, *, last: bool) -> None:
        """Write a checkpoint and delete what is not to be kept; only the last one must succeed.

        Another that cannot be written, for want of space say, costs no run: the earlier ones stay.
        """
        try:
            path = checkpoint.write(self.config.out, self.step, **self._everything(logged), ranks=self.ranks)
        except OSError as error:
            if last:
                raise
            self.log(f"{error}; training goes on, and saves again after {self.config.checkpoint_interval} steps")
            return
        self._saved = path
        if not self.ranks.is_main:
            return
        try:
            config = self.config
            checkpoint.retain(config.out, config.keep_checkpoints, every=config.keep_every, last_step=self.step)
        except OSError as error:
            self.log(f"an older checkpoint could not be deleted: {error}")

    def _everything(self, logged: Totals) -> dict[str, Any]:
        """All that the next step depends on, as checkpoint.write takes it."""
        evaluated = self.evaluation is not None and self._evaluated_at == self.step
        totals = self.updater.totals
        return {
            "tensors": {"model": self.model.state_dict(), "optimizer": self.updater.optimizers.state_tensors()}
            | ({"ema": self.ema.state_dict()} if self.ema else {}),
            "state": {
                "metadata": self.metadata,
                "config": self.config.as_dict(),
                "totals": dataclasses.asdict(totals),
                "loss_is_finite": totals.skipped_in_a_row == 0,
                "logged": dataclasses.asdict(logged),
                "loss_scale": self.updater.loss_scale.state_dict(),
                "outliers": self.updater.outliers.state_dict(),
                "early_stopping": self.early_stopping.state_dict(),
                "eval_loss": self.evaluation.loss if self.evaluation and evaluated else None,
            },
            "rank_state": {
                "random": random_state.capture(self.precision.device),
                "loader": self.train_loader.state_dict(),
                "threads": torch.get_num_threads(),
            },
        }

    def _begin(self) -> None:
        """Start at step 0, perhaps with the weights of another run."""
        if source := self.config.init_from:
            weights = checkpoint.read_weights(source, sharded=sharded_parameters(self.model))
            try:
                self._load_model(checkpoint.fitted_weights(weights, self.model.state_dict()))
            except Exception as error:  # a module's set_extra_state may raise anything
                raise checkpoint.CheckpointError(f"{source} does not fit this model: {_one_line(error)}") from error
            self.updater.optimizers.leaves.adopt()
            if self.ema:
                self.ema.reset()
            self.log(f"weights from {source}")
        self._rehearse()

    def _rehearse(self) -> None:
        """Save and resume the untrained model, but for the disk: what fails at that is told before the first step."""
        try:
            self._load_model(checkpoint.rehearse(**self._everything(self._logged))["model"])
        except checkpoint.CheckpointError:
            raise
        except Exception as error:  # of whatever class the model's own code raises
            raise checkpoint.CheckpointError(
                f"{type(self.model).__name__} cannot be saved and resumed: {_one_line(error)}"
            ) from error

    def _load_model(self, saved: dict[str, Any]) -> None:
        """load_state_dict, which alone would change dtypes in silence and refuse expanded tensors."""
        own = self.model.state_dict()
        saved = dict(saved)
        for name, tensor in own.items():
            fixed = isinstance(tensor, Tensor) and not name.endswith("_extra_state")
            if not fixed or not isinstance(saved.get(name), Tensor):
                continue
            if saved[name].dtype != tensor.dtype:
                raise ValueError(f"{name} is {saved[name].dtype}, and the model's is {tensor.dtype}")
            if tensor.layout == torch.strided and 0 in tensor.stride() and saved[name].shape == tensor.shape:
                once = tuple(slice(1) if stride == 0 else slice(None) for stride in tensor.stride())
                tensor[once].copy_(saved[name][once])
                saved[name] = tensor
        self.model.load_state_dict(saved)

    def _resume(self, saved: checkpoint.Checkpoint) -> None:
        """Continue from a checkpoint: everything that the next step depends on."""
        try:
            self._load_model(saved.tensors["model"])
            self.updater.optimizers.load_state_tensors(saved.tensors["optimizer"])
            if self.ema:
                self.ema.load_state_dict(saved.tensors["ema"]) if "ema" in saved.tensors else self.ema.reset()
        except Exception as error:  # a module's set_extra_state may raise anything
            raise checkpoint.CheckpointError(f"{saved.path} does not fit this model: {_one_line(error)}") from error
        self._resume_state(saved)
        self._announce(saved)

    def _resume_state(self, saved: checkpoint.Checkpoint) -> None:
        """The part that is JSON, each entry checked: that its checksum is right does not make it ours."""
        precision, updater = self.precision, self.updater
        same_ranks = saved.state["world_size"] == self.ranks.world_size
        load: dict[str, Callable[[Any], Any]] = {
            "config": lambda value: value,
            "loss_scale": updater.loss_scale.load_state_dict,
            "outliers": updater.outliers.load_state_dict,
            "early_stopping": self.early_stopping.load_state_dict,
            "totals": lambda value: setattr(updater, "totals", Totals.read(value)),
            "logged": lambda value: setattr(self, "_logged", Totals.read(value)),
            "loader": self.train_loader.load_state_dict,
            "random": lambda value: random_state.restore(value, precision.device),
            "threads": lambda value: value,
        }
        for key, put_back in load.items():
            file, values = "state.json", saved.state
            if key in ("loader", "random", "threads"):
                file, values = checkpoint.rank_file(self.ranks.rank if same_ranks else 0), saved.rank_state
            kind = int if key == "threads" else dict
            if type(values.get(key)) is not kind:
                was = f"is {values[key]!r:.80}, expected {kind.__name__}" if key in values else "is missing"
                raise checkpoint.CheckpointError(
                    f"{saved.path} is not one that this trainer writes: {key!r} in {file} {was}"
                )
            try:
                put_back(values[key])
            except Exception as error:  # the loader may be anybody's, and PyTorch and NumPy raise what they like
                raise checkpoint.CheckpointError(
                    f"{saved.path} cannot be resumed: {key!r} in {file}: {_one_line(error)}"
                ) from error
        self.step, self._saved = saved.state["step"], saved.path
        if not same_ranks:  # and none of these may draw what it drew from the start
            random_state.seed_everything((self.config.seed + self.ranks.rank + 1_000_003 * self.step) % 2**63)

    def _starting_point(self) -> checkpoint.Checkpoint | None:
        """The checkpoint to continue from, if there is one: rank 0 chooses, and the others read the same."""
        config, ranks, sharded, saved = self.config, self.ranks, sharded_parameters(self.model), None
        with ranks.fail_together():
            if ranks.is_main and config.resume_from and not checkpoint.paths(config.out):
                saved = checkpoint.read(config.resume_from, ranks=ranks, sharded=sharded)
            elif ranks.is_main:
                saved = checkpoint.read_newest(config.out, ranks=ranks, sharded=sharded, on_log=self.log)
        chosen = ranks.gather(saved and str(saved.path))[0]
        with ranks.fail_together():
            if chosen and not ranks.is_main:
                saved = checkpoint.read(Path(chosen), ranks=ranks, sharded=sharded)
        return saved

    def _announce(self, saved: checkpoint.Checkpoint) -> None:
        ended = "" if self.step < self.config.steps else f", which is all of the {self.config.steps} steps asked for"
        self.log(f"resumed from {saved.path}{ended}")
        was, ranks = saved.state["world_size"], self.ranks.world_size
        if was != ranks:
            self.log(f"this run has {ranks} ranks and had {was}: results are no longer equal to the last bit")
        threads, now = saved.rank_state["threads"], torch.get_num_threads()
        if threads != now:
            self.log(f"this run has {now} CPU threads and had {threads}: results are no longer equal to the last bit")
        config = self.config.as_dict()
        changes = checkpoint.differences({key: saved.state["config"].get(key) for key in config}, config)
        if told := [f"{key} {was} -> {value}" for key, was, value in changes if key != "out"]:
            self.log(f"changed since then: {', '.join(told)}")


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
            f"the model has no row for what it was to look up ({_one_line(error)}): the ids of the batch go up to "
            f"{max(ids)} and its rows have {batches[0].tokens.shape[1]} tokens; expected a model with a larger "
            "vocabulary, or one that takes longer rows"
        ) from error


def _check_repeatable(eval_loader: Iterable[Batch] | None) -> None:
    """Raise ValueError for held-out batches that one evaluation would use up, or of which there are none."""
    if isinstance(eval_loader, Iterator):
        raise ValueError(
            f"eval_loader is of type {type(eval_loader).__name__}, an iterator, which the first evaluation would use "
            "up: expected what can be iterated again and again, such as a list or one_pass()"
        )
    if isinstance(eval_loader, Sized) and len(eval_loader) == 0:
        raise ValueError("eval_loader holds no batch: give some, or None")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) if not isinstance(error, KeyError) else f"{error} is missing"


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
