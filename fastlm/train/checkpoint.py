"""Checkpoints that survive kill -9, full disks and flipped bits, and whose loading runs no code from the file.

    <run>/checkpoints/step-00000100/
        model.safetensors        weights, each storage once; of bf16-params the fp32 masters
        optimizer.safetensors    <parameter>/<quantity>
        model/shard-*.safetensors, optimizer/shard-*.safetensors
                                 in place of these, one file per rank, where FSDP shares the parameters out over ranks
        extra.pt                 only if safetensors cannot hold all of it: extra states, rare dtypes, sparse tensors
        state.json               step, world size, metadata, config, loss scale, held-out loss; what the run began with;
                                 per group, its size and aliases
        rank-00000.json          per rank: random generators, loader position
        SHA256SUMS               checksums of all the above; `sha256sum -c SHA256SUMS` checks them too

`checkpoint_files.py` makes the directory, `checkpoint_tensors.py` the files of tensors; `run_start.py` says which of
them a run may start from, `retention.py` which stay.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
from safetensors import SafetensorError

from fastlm.train import shards
from fastlm.train.checkpoint_files import (
    CheckpointError,
    DamagedCheckpointError,
    clearing_up,
    differences,
    is_leftover,
    partial_path,
    rank_file,
    read_json,
    read_state,
    remove,
    seal,
    step_of,
    verify,
    verify_state,
    write_json,
)
from fastlm.train.checkpoint_tensors import (
    EXTRA_FILE,
    Group,
    divided,
    group_file,
    pack_extra,
    read_group,
    unpack_extra,
    write_tensors,
)
from fastlm.train.distributed import Ranks
from fastlm.train.knobs import Knobs
from fastlm.train.progress import count
from fastlm.train.run_lock import RunInUseError, locked

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclasses.dataclass
class CheckpointKnobs(Knobs):
    """When checkpoints are written, and which are kept."""

    checkpoint_interval: int = 100
    """Steps between checkpoints; 0 saves after the last step alone."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep; that with the lowest held-out loss and the newest of a finite loss stay besides."""
    keep_every: int = 0
    """Keep for ever the checkpoint of each step that is a multiple of this; 0 keeps none for that."""
    resume: str = "auto"
    """auto continues the run in out, none refuses an out that holds one, a checkpoint's path goes on from there."""
    init_from: Path | None = None
    """Start at step 0 with the weights of this checkpoint, or of this .safetensors file."""

    def __post_init__(self) -> None:
        if isinstance(self.resume, Path):  # as scripts have it
            self.resume = str(self.resume)
        super().__post_init__()
        self.check_integers("checkpoint_interval", "keep_every", minimum=0)
        self.check_integers("keep_checkpoints", minimum=1)
        if not self.resume or "\0" in self.resume:
            raise ValueError(
                f"{type(self).__name__}: resume is {self.resume!r}, expected auto, none or the path of a checkpoint"
            )
        if self.init_from is not None:
            self.check_path("init_from")
        if self.init_from is not None and self.resume not in ("auto", "none"):
            raise ValueError(
                f"{type(self).__name__}: resume is {self.resume!r} and init_from {str(self.init_from)!r}: a run starts "
                "from one of them"
            )

    @property
    def resume_from(self) -> Path | None:
        """The checkpoint that resume names, if it names one."""
        return None if self.resume in ("auto", "none") else Path(os.path.expanduser(self.resume))


_ALONE = Ranks()


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: named groups of tensors, and JSON values.

    The group "model" is the model's state_dict, in which there may be what the modules' get_extra_state gave. Where the
    number of ranks is another one than when it was written, rank_state is that of rank 0.
    """

    path: Path
    tensors: dict[str, dict[str, Any]]
    state: dict[str, Any]
    rank_state: dict[str, Any]

    @property
    def metadata(self) -> dict[str, Any]:
        return self.state["metadata"]


# Finding


def paths(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; a file, a link to nothing or a stray name is none."""
    candidates = {step_of(path): path for path in (run / "checkpoints").glob("step-*") if os.path.isdir(path)}
    return [path for step, path in sorted(candidates.items()) if step >= 0]


def steps_done(run: Path) -> int:
    """The step of the newest checkpoint, sound or not; 0 without one."""
    return max((step_of(path) for path in paths(run)), default=0)


def path_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return run / "checkpoints" / f"step-{step:08d}"


def best(run: Path) -> Path | None:
    """The checkpoint with the lowest held-out loss, or None if no checkpoint was evaluated."""
    losses = {path: loss for path in paths(run) if (loss := _held_out_loss(path)) is not None}
    return min(losses, key=losses.__getitem__, default=None)


def _held_out_loss(path: Path) -> float | None:
    try:
        loss = read_state(path)["eval_loss"]
        return loss if isinstance(loss, float) and math.isfinite(loss) else None
    except (DamagedCheckpointError, KeyError):
        return None  # damaged: verify says so where it matters


def newest_state(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose state.json is sound, and what that holds; None if there is no checkpoint.

    Raises DamagedCheckpointError if a state.json is what was written, but not by fastlm, and none is sound.
    """
    refused = None
    for path in reversed(paths(run)):
        with contextlib.suppress(DamagedCheckpointError):
            verify_state(path)
            try:
                return path, read_state(path)
            except DamagedCheckpointError as error:
                refused = refused or error
    if refused:
        raise refused
    return None


# What a run began with


def beginning(state: dict[str, Any]) -> dict[str, list[str]]:
    """{"resume": spellings, "init_from": spellings} of what the run of a state began with, empty lists for nothing."""
    if "began_with" in state:
        return state["began_with"]
    config = state.get("config")  # of the command that wrote it: of the first checkpoint, that which began the run
    given = config if isinstance(config, dict) else {}
    resume, init_from = given.get("resume"), given.get("init_from")
    return {
        "resume": spellings(Path(resume)) if isinstance(resume, str) and resume not in ("auto", "none") else [],
        "init_from": spellings(Path(init_from)) if isinstance(init_from, str) else [],
    }


def spellings(path: Path) -> list[str]:
    """The path as it was given, by which a command is known again where all was moved, and its one absolute form."""
    home_spelled_out = os.path.expanduser(path)
    return [home_spelled_out, os.path.realpath(home_spelled_out)]


# Reading


def read_newest(
    run: Path,
    *,
    ranks: Ranks = _ALONE,
    sharded: Mapping[str, "DTensor"] | None = None,
    on_log: Callable[[str], None] = lambda line: None,
) -> Checkpoint | None:
    """The newest checkpoint that is not damaged, telling on_log of each newer one that is; None if there is none.

    Raises CheckpointError if there are checkpoints and all are damaged, because to start afresh would overwrite what
    could perhaps be rescued.
    """
    for path in reversed(paths(run)):
        try:
            return read(path, ranks=ranks, sharded=sharded)
        except DamagedCheckpointError as error:
            on_log(f"skipped a damaged checkpoint: {error}")
    if found := paths(run):
        raise CheckpointError(f"all {len(found)} checkpoints of {run} are damaged: move it away to start afresh")
    return None


def read_best(run: Path) -> Checkpoint | None:
    """The undamaged checkpoint with the lowest held-out loss, else the newest; None if there is none.

    A process that trains in the run may delete one at any moment, also while it is read here.
    """
    while path := best(run):
        try:
            return read(path)
        except CheckpointError:
            if path.exists():  # damaged, not deleted
                break
    return read_newest(run)


def read(path: Path, *, ranks: Ranks = _ALONE, sharded: Mapping[str, "DTensor"] | None = None) -> Checkpoint:
    """Load a checkpoint onto the CPU after verifying its checksums, on one rank or on each.

    sharded   parameters by name: these, and what belongs to them, are loaded as they are shared out, to their device

    Raises DamagedCheckpointError if a file is missing, altered or not one that write makes, CheckpointError if there is
    no such checkpoint.
    """
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint {path}")
    verify(path)
    try:
        state = read_state(path)
        rank = ranks.rank if state["world_size"] == ranks.world_size else 0
        rank_state = read_json(path / rank_file(rank))
        extra = unpack_extra((path / EXTRA_FILE).read_bytes()) if (path / EXTRA_FILE).exists() else {}
        tensors = {name: read_group(path, name, group, extra, sharded or {}) for name, group in state["groups"].items()}
    except (DamagedCheckpointError, MemoryError):
        raise
    except Exception as error:  # the checksums hold, so whatever is wrong with the content, someone else made it
        reason = " ".join(str(error).split())
        raise DamagedCheckpointError(f"{path} is not a checkpoint that fastlm writes: {reason}") from error
    return Checkpoint(path, tensors, state, rank_state)


# Writing


def prepare(run: Path) -> None:
    """Create the run directory, prove that it can be written, and clear what a killed process left half-done.

    Raises OSError before any work is lost, RunInUseError if another process trains there.
    """
    try:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        with locked(run):  # what lies there half-done may be another process's present work
            with tempfile.NamedTemporaryFile(dir=run / "checkpoints", prefix=".probe."):
                pass
            for leftover in (run / "checkpoints").glob(".step-*"):
                if is_leftover(leftover):
                    with contextlib.suppress(OSError):
                        remove(leftover)
    except RunInUseError:
        raise
    except OSError as error:
        raise OSError(f"cannot write to the run directory {run}: {error.strerror}; choose another with out") from error


def rehearse(
    *, tensors: dict[str, dict[str, Any]], state: dict[str, Any], rank_state: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Do all of write and read that may fail but for a lack of space; the groups as they would be read back.

    Raises CheckpointError, naming what cannot be saved: without this it is found out at the first checkpoint, and the
    steps until then are lost.
    """
    for key, value in [*state.items(), *rank_state.items()]:
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"no checkpoint can hold the {key} of this run: {error}") from error
    metadata = state.get("metadata", {})
    for key, was, _ in differences(json.loads(json.dumps(metadata)), metadata):  # NaN, which equals nothing
        raise CheckpointError(f"the metadata's {key} is {was!r}: no resumed run could have the same; leave it out")
    extras = {}
    for group, values in tensors.items():
        plain, extras[group] = divided(values)
        stand_ins = {name: shards.local(tensor).new_empty(0) for name, tensor in plain.items()}
        try:
            unsaved = stand_ins.keys() - safetensors.torch.load(safetensors.torch.save(stand_ins)).keys()
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(f"no checkpoint can hold the {group}'s tensors: {error}") from error
        if unsaved:
            raise CheckpointError(f"no checkpoint can hold a tensor named {sorted(unsaved)[0]!r}: rename it")
    read_back = unpack_extra(pack_extra(extras))
    return {group: values | read_back[group] for group, values in tensors.items()}


def require_space(run: Path, num_bytes: int) -> None:
    """Raise OSError unless the run's disk has room for a checkpoint of num_bytes."""
    free = shutil.disk_usage(run).free
    if free < num_bytes:
        raise OSError(
            f"the disk of {run} has {count(free)}B free and a checkpoint takes {count(num_bytes)}B: "
            "free some space, or choose another run directory with out"
        )


def write(
    run: Path,
    step: int,
    *,
    tensors: dict[str, dict[str, Any]],
    state: dict[str, Any],
    rank_state: dict[str, Any],
    ranks: Ranks,
) -> Path:
    """Write the checkpoint of a step; every rank calls this, and returns once the checkpoint is complete.

    tensors     groups by name, a file each: the model's state_dict as "model", the optimisers' state, ...
    state       JSON values that all ranks share
    rank_state  JSON values of this rank

    Raises OSError if it cannot be written, CheckpointError if the model has got a state that rehearse would refuse;
    earlier checkpoints are then untouched.
    """
    final = path_of(run, step)
    partial = partial_path(final)
    with ranks.fail_together(), clearing_up(final):
        groups = {name: Group.of(values) for name, values in tensors.items()}
        extra = {name: group.extra for name, group in groups.items() if group.extra}
        packed = pack_extra(extra) if extra and ranks.is_main else b""
        if ranks.is_main:
            require_space(run, sum(group.nbytes for group in groups.values()) + len(packed))
            remove(partial)
            partial.mkdir()
    with ranks.fail_together(), clearing_up(final):
        write_json(partial / rank_file(ranks.rank), rank_state)
    for name, group in groups.items():
        if group.is_sharded:  # on all ranks, or on none
            with ranks.fail_together(), clearing_up(final):
                shards.write(partial / name, group.plain)
    with ranks.fail_together(), clearing_up(final):
        if ranks.is_main:
            for name, group in groups.items():
                if not group.is_sharded:
                    write_tensors(partial / group_file(name), group.plain)
            if packed:
                (partial / EXTRA_FILE).write_bytes(packed)
            described = {
                name: {"num_tensors": len(tensors[name]), "aliases": group.aliases} for name, group in groups.items()
            }
            _, earlier = newest_state(run) or (None, state)
            began_with = beginning(earlier)
            shared = {"step": step, "world_size": ranks.world_size, "groups": described, "began_with": began_with}
            write_json(partial / "state.json", state | shared)
            seal(partial, final)
    return final
