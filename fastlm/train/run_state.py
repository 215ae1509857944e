"""Everything that the next step of a run depends on: saved after a step, put back before the next one.

What a checkpoint holds is `RunState.as_saved`, and what is done with it `RunState.resume`: what a later step depends on
belongs into both.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.train import checkpoint, random_state, run_start
from fastlm.train.checkpoint import Checkpoint, CheckpointError
from fastlm.train.config import TrainConfig
from fastlm.train.early_stopping import EarlyStopping
from fastlm.train.protocols import Loader
from fastlm.train.retention import retain
from fastlm.train.shards import sharded_parameters
from fastlm.train.update import Totals, Updater
from fastlm.wording import quantity


class RunState:
    """Where a run is, with all that its next step depends on.

    step        steps done
    eval_loss   the held-out loss after this step, if it was evaluated
    logged      the totals at the last log line
    saved       the newest checkpoint of this process, else the run directory
    evaluation_is_due   after this step, and not done yet: a signal may end the run before
    """

    def __init__(
        self,
        model: nn.Module,
        updater: Updater,
        loader: Loader,
        early_stopping: EarlyStopping,
        config: TrainConfig,
        metadata: dict[str, Any],
        log: Callable[[str], None],
    ) -> None:
        self.step = 0
        self.eval_loss: float | None = None
        self.evaluation_is_due = False
        self.logged = Totals()
        self.saved = config.out
        self._model, self._updater, self._loader, self._early_stopping = model, updater, loader, early_stopping
        self._config, self._metadata, self._log = config, metadata, log
        self._ranks, self._device = updater.ranks, updater.precision.device

    @property
    def is_saved(self) -> bool:
        """Whether there is nothing that a checkpoint would add."""
        return self.step == 0 or self.saved == checkpoint.path_of(self._config.out, self.step)

    def step_done(self, *, evaluation_is_due: bool) -> None:
        """Count a step."""
        self.step += 1
        self.eval_loss, self.evaluation_is_due = None, evaluation_is_due

    def evaluated(self, loss: float) -> None:
        """Note the held-out loss after this step."""
        self.eval_loss, self.evaluation_is_due = loss, False

    def as_saved(self) -> dict[str, Any]:
        """All that the next step depends on, as checkpoint.write takes it."""
        updater, ema, totals = self._updater, self._updater.ema, self._updater.totals
        return {
            "tensors": {"model": self._weights(), "optimizer": updater.optimizers.state_tensors()}
            | ({"ema": ema.state_dict()} if ema else {}),
            "state": {
                "metadata": self._metadata,
                "config": self._config.as_dict(),
                "totals": dataclasses.asdict(totals),
                "loss_is_finite": totals.skipped_in_a_row == 0,
                "logged": dataclasses.asdict(self.logged),
                "loss_scale": updater.loss_scale.state_dict(),
                "outliers": updater.outliers.state_dict(),
                "early_stopping": self._early_stopping.state_dict(),
                "eval_loss": self.eval_loss,
                "evaluation_is_due": self.evaluation_is_due,
            },
            "rank_state": {
                "random": random_state.capture(self._device),
                "loader": self._loader.state_dict(),
                "threads": torch.get_num_threads(),
            },
        }

    def _weights(self) -> dict[str, Any]:
        return self._updater.optimizers.leaves.state_dict(self._model)

    def save(self, *, last: bool) -> None:
        """Write a checkpoint and delete what is not to be kept; only the last one must succeed.

        Another that cannot be written, for want of space say, costs no run: the earlier ones stay.
        """
        config = self._config
        try:
            self.saved = checkpoint.write(config.out, self.step, **self.as_saved(), ranks=self._ranks)
        except OSError as error:
            if last:
                raise
            self._log(f"{error}; training goes on, and saves again after {config.checkpoint_interval} steps")
            return
        if not self._ranks.is_main:
            return
        try:
            retain(config.out, config.keep_checkpoints, every=config.keep_every, last_step=self.step)
        except OSError as error:
            self._log(f"an older checkpoint could not be deleted: {error}")

    # The start of a run

    def start(self) -> None:
        """Resume the checkpoint that there is to continue from, else begin at step 0, perhaps with another's weights.

        Raises CheckpointError if no checkpoint is sound or one does not fit, or the model has a state that none can
        hold, OSError if there is no space for one.
        """
        saved = self._starting_point()
        with self._ranks.fail_together():
            self.resume(saved) if saved else self._begin()
            checkpoint.require_space(self._config.out, self._nbytes())

    def _starting_point(self) -> Checkpoint | None:
        """The checkpoint to continue from, if there is one: rank 0 chooses, and the others read the same."""
        config, ranks, sharded, saved = self._config, self._ranks, sharded_parameters(self._model), None
        with ranks.fail_together():
            if ranks.is_main and config.resume_from and not checkpoint.paths(config.out):
                saved = checkpoint.read(config.resume_from, ranks=ranks, sharded=sharded)
            elif ranks.is_main:
                saved = checkpoint.read_newest(config.out, ranks=ranks, sharded=sharded, on_log=self._log)
        chosen = ranks.gather(saved and str(saved.path))[0]
        with ranks.fail_together():
            if chosen and not ranks.is_main:
                saved = checkpoint.read(Path(chosen), ranks=ranks, sharded=sharded)
        return saved

    def _begin(self) -> None:
        """Start at step 0, perhaps with the weights of another run."""
        if source := self._config.init_from:
            weights = run_start.read_weights(source, sharded=sharded_parameters(self._model))
            try:
                self._load_model(run_start.fitted_weights(weights, self._weights()))
            except Exception as error:  # a module's set_extra_state may raise anything
                raise CheckpointError(f"{source} does not fit this model: {one_line(error)}") from error
            if self._updater.ema:
                self._updater.ema.reset()
            self._log(f"weights from {source}")
        self._rehearse()

    def _rehearse(self) -> None:
        """Save and resume the untrained model, but for the disk: what fails at that is told before the first step."""
        try:
            self._load_model(checkpoint.rehearse(**self.as_saved())["model"])
        except CheckpointError:
            raise
        except Exception as error:  # of whatever class the model's own code raises
            raise CheckpointError(
                f"{type(self._model).__name__} cannot be saved and resumed: {one_line(error)}"
            ) from error

    def _nbytes(self) -> int:
        """What a checkpoint takes, once the optimisers have all of their state."""
        optimizers, ema = self._updater.optimizers, self._updater.ema
        weights: dict[Tensor, Tensor] = {parameter: parameter for parameter in self._model.parameters()}
        if optimizers.leaves.masters:  # they are saved in the place of their bf16 copies
            weights |= dict(optimizers.leaves.items())
        ema_bytes = sum(leaf.nbytes for _, leaf in optimizers.leaves.items()) if ema else 0
        return sum(weight.nbytes for weight in weights.values()) + optimizers.nbytes + ema_bytes

    # Resuming

    def resume(self, saved: Checkpoint) -> None:
        """Continue from a checkpoint: the inverse of as_saved."""
        updater = self._updater
        try:
            self._load_model(_masters_as_weights(saved.tensors, self._weights()))
            updater.optimizers.load_state_tensors(saved.tensors["optimizer"])
            if updater.ema:
                updater.ema.load_state_dict(saved.tensors["ema"]) if "ema" in saved.tensors else updater.ema.reset()
        except Exception as error:  # a module's set_extra_state may raise anything
            raise CheckpointError(f"{saved.path} does not fit this model: {one_line(error)}") from error
        self._resume_values(saved)
        self._announce(saved)

    def _load_model(self, saved: dict[str, Any]) -> None:
        """load_state_dict, which alone would change dtypes in silence and refuse expanded tensors."""
        weights, own, leaves = dict(saved), self._weights(), self._updater.optimizers.leaves
        saved = dict(saved)
        for name, tensor in self._model.state_dict().items():
            fixed = isinstance(tensor, Tensor) and not name.endswith("_extra_state")
            if not fixed or not isinstance(saved.get(name), Tensor):
                continue
            was, expected = saved[name].dtype, own[name].dtype
            if was != expected:
                raise ValueError(f"{name} is {was}, and the model's is {expected}: build the model in {was}")
            if tensor.layout == torch.strided and 0 in tensor.stride() and saved[name].shape == tensor.shape:
                once = tuple(slice(1) if stride == 0 else slice(None) for stride in tensor.stride())
                tensor[once].copy_(saved[name][once])
                saved[name] = tensor
        self._model.load_state_dict(saved)
        leaves.adopt(self._model, weights)

    def _resume_values(self, saved: Checkpoint) -> None:
        """The part that is JSON, each entry checked: that its checksum is right does not make it ours."""
        updater = self._updater
        same_ranks = saved.state["world_size"] == self._ranks.world_size
        load: dict[str, Callable[[Any], Any]] = {
            "config": lambda value: value,
            "loss_scale": updater.loss_scale.load_state_dict,
            "outliers": updater.outliers.load_state_dict,
            "early_stopping": self._early_stopping.load_state_dict,
            "totals": lambda value: setattr(updater, "totals", Totals.read(value)),
            "logged": lambda value: setattr(self, "logged", Totals.read(value)),
            "loader": self._loader.load_state_dict,
            "random": lambda value: random_state.restore(value, self._device),
            "threads": lambda value: value,
        }
        for key, put_back in load.items():
            file, values = "state.json", saved.state
            if key in ("loader", "random", "threads"):
                file, values = checkpoint.rank_file(self._ranks.rank if same_ranks else 0), saved.rank_state
            kind = int if key == "threads" else dict
            if type(values.get(key)) is not kind:
                was = f"is {values[key]!r:.80}, expected {kind.__name__}" if key in values else "is missing"
                raise CheckpointError(f"{saved.path} is not one that this trainer writes: {key!r} in {file} {was}")
            try:
                put_back(values[key])
            except Exception as error:  # the loader may be anybody's, and PyTorch and NumPy raise what they like
                raise CheckpointError(
                    f"{saved.path} cannot be resumed: {key!r} in {file}: {one_line(error)}"
                ) from error
        self.step, self.saved = saved.state["step"], saved.path
        self.evaluation_is_due = saved.state.get("evaluation_is_due") is True  # older checkpoints lack it
        if not same_ranks:  # and none of these may draw what it drew from the start
            random_state.seed_everything((self._config.seed + self._ranks.rank + 1_000_003 * self.step) % 2**63)

    def _announce(self, saved: Checkpoint) -> None:
        ended = "" if self.step < self._config.steps else f", which is all of the {self._config.steps} steps asked for"
        self._log(f"resumed from {saved.path}{ended}")
        for noun, was, now in (
            ("rank", saved.state["world_size"], self._ranks.world_size),
            ("CPU thread", saved.rank_state["threads"], torch.get_num_threads()),
        ):
            if was != now:
                has = quantity(now, noun)
                self._log(f"this run has {has} and had {was}: results are no longer equal to the last bit")
        config = self._config.as_dict()
        changes = checkpoint.differences({key: saved.state["config"].get(key) for key in config}, config)
        if told := [f"{key} {was} -> {value}" for key, was, value in changes if key != "out"]:
            self._log(f"changed since then: {', '.join(told)}")


def _masters_as_weights(groups: dict[str, dict[str, Any]], own: dict[str, Any]) -> dict[str, Any]:
    """The weights of a checkpoint: older ones of bf16-params hold bf16 copies, and masters among the optimizer's."""
    weights, optimizer = groups["model"], groups["optimizer"]
    masters = {key: optimizer.pop(key) for key in list(optimizer) if key.endswith("/master")}
    if not masters:
        return weights
    of_weight = {id(weights.get(key.removesuffix("/master"))): master for key, master in masters.items()}
    whole = {name: of_weight.get(id(weight), weight) for name, weight in weights.items()}
    halves = [name for name, weight in whole.items() if getattr(weight, "dtype", None) == torch.bfloat16]
    return whole | {name: whole[name].to(own[name].dtype) for name in halves if name in own}


def one_line(error: Exception) -> str:
    """The message of an error, whatever it looks like."""
    return " ".join(str(error).split()) if not isinstance(error, KeyError) else f"{error} is missing"
