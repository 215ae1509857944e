"""Checkpoints that survive kill -9, full disks and flipped bits, and whose loading runs no code from the file.

    <run>/checkpoints/step-00000100/
        model.safetensors        weights, each storage once
        optimizer.safetensors    <parameter>/<quantity>
        model/shard-*.safetensors, optimizer/shard-*.safetensors
                                 in place of these, one file per rank, where FSDP shares the parameters out over ranks
        extra.pt                 only if safetensors cannot hold all of it: extra states, rare dtypes, sparse tensors
        state.json               step, world size, metadata, config, loss scale, held-out loss; what the run began with;
                                 per group, its size and aliases
        rank-00000.json          per rank: random generators, loader position
        SHA256SUMS               checksums of all the above; `sha256sum -c SHA256SUMS` checks them too

A checkpoint is written into a hidden directory beside, every file is synced, and the directory is then renamed: a name
that starts with "step-" is always complete. Without the syncs a power cut could leave the name without the bytes.
A link to such a directory is a checkpoint too: where it is to be deleted the link goes, and what it points to stays.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fastlm.train import shards
from fastlm.train.distributed import Ranks
from fastlm.train.knobs import Knobs
from fastlm.train.run_lock import RunInUseError, locked

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_SUMS = "SHA256SUMS"
_EXTRA = "extra.pt"
_ASIDE = re.compile(r"\.(step-[0-9]+)(\.partial|\.deleted)?")  # what a killed process leaves

# Beside tensors, numbers, strings and containers of them, what extra.pt may hold: making these runs no code of the file
_HARMLESS: list[Any] = [io.BytesIO, frozenset, np.ndarray, np.dtype]
_HARMLESS += [np.empty(0).__reduce__()[0], np.float32(0).__reduce__()[0]]  # private functions of NumPy's, by use
_HARMLESS += {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?SU"}


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


class CheckpointError(ValueError):
    """A checkpoint is absent, damaged or not of this run."""


class DamagedCheckpointError(CheckpointError):
    """A file of the checkpoint is missing or not what was written."""


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
    candidates = {_step_of(path): path for path in (run / "checkpoints").glob("step-*") if os.path.isdir(path)}
    return [path for step, path in sorted(candidates.items()) if step >= 0]


def steps_done(run: Path) -> int:
    """The step of the newest checkpoint, sound or not; 0 without one."""
    return max((_step_of(path) for path in paths(run)), default=0)


def path_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return run / "checkpoints" / f"step-{step:08d}"


def _step_of(path: Path) -> int:
    """The step that the name of a checkpoint tells, or -1 where path_of gives no such name."""
    digits = re.fullmatch(r"step-([0-9]+)", path.name)
    return int(digits[1]) if digits and path.name == f"step-{int(digits[1]):08d}" else -1


def best(run: Path) -> Path | None:
    """The checkpoint with the lowest held-out loss, or None if no checkpoint was evaluated."""
    losses = {path: loss for path in paths(run) if (loss := _held_out_loss(path)) is not None}
    return min(losses, key=losses.__getitem__, default=None)


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
        state = _read_state(path)
        rank = ranks.rank if state["world_size"] == ranks.world_size else 0
        rank_state = _read_json(path / rank_file(rank))
        extra = _unpacked((path / _EXTRA).read_bytes()) if (path / _EXTRA).exists() else {}
        tensors = {
            name: _read_group(path, name, group, extra, sharded or {}) for name, group in state["groups"].items()
        }
    except (DamagedCheckpointError, MemoryError):
        raise
    except Exception as error:  # the checksums hold, so whatever is wrong with the content, someone else made it
        reason = " ".join(str(error).split())
        raise DamagedCheckpointError(f"{path} is not a checkpoint that fastlm writes: {reason}") from error
    return Checkpoint(path, tensors, state, rank_state)


def read_weights(path: Path, *, sharded: Mapping[str, "DTensor"] | None = None) -> dict[str, Any]:
    """The weights of a checkpoint, or of a .safetensors file, which has no checksums.

    Raises CheckpointError if it is neither, or damaged.
    """
    if path.is_dir():
        if found := paths(path):
            raise CheckpointError(f"{path} is a run: name one of its checkpoints, such as {found[-1]}")
        return read(path, sharded=sharded).tensors["model"]
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        return {name: shards.shared_out(name, tensor, sharded or {}) for name, tensor in _read_tensors(path).items()}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} is neither a checkpoint nor a .safetensors file: {reason}") from error


def fitted_weights(weights: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Weights as a model's own state_dict has them: the same names and shapes; dtypes become the model's.

    A name that is left out because its tensor is saved under another, as tied weights are, is no difference.
    Raises ValueError that names the first of those that do not fit, and tells how many there are.
    """
    aliases = _Group.of(dict(own)).aliases
    whole = dict(weights) | {
        alias: weights[name] for alias, name in aliases.items() if alias not in weights and name in weights
    }
    missing = sorted(own.keys() - whole.keys())
    unknown = sorted(whole.keys() - own.keys())
    shapes = {name: [_shape(values[name]) for values in (whole, own)] for name in own if name in whole}
    wrong = [f"{name} {was}, not {expected}" for name, (was, expected) in shapes.items() if was != expected]
    kinds = [("missing", missing), ("unknown", unknown), ("of another shape", wrong)]
    told = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})" for kind, names in kinds if names
    ]
    if told:
        raise ValueError("; ".join(told))
    return {
        name: value.to(own[name].dtype) if isinstance(value, Tensor) and isinstance(own[name], Tensor) else value
        for name, value in whole.items()
    }


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def verify(path: Path) -> None:
    """Raise DamagedCheckpointError, naming the file, unless every file of the checkpoint is what was written."""
    for name, digest in _read_sums(path).items():
        _verify_file(path / name, digest)


def check_metadata(run: Path, metadata: dict[str, Any]) -> None:
    """Raise CheckpointError, naming both values, at the first fact in which metadata differs from that of the run.

    Reads but one small file, so that a mistake is told before a model is loaded or anything is written.
    """
    if found := _newest_state(run):
        _compare_metadata(*found, metadata)


def check_start(run: Path, knobs: CheckpointKnobs, metadata: dict[str, Any], *, restarts: int = 0) -> None:
    """Raise CheckpointError where knobs.resume and knobs.init_from do not agree with what the run directory holds.

    A run there is never overwritten, and never taken for one that began elsewhere; the command that began it may be
    given again. Where torchrun has restarted all ranks, resume none goes on too.
    """
    found = paths(run)
    if not found and knobs.resume_from is not None:
        if not knobs.resume_from.is_dir():
            raise CheckpointError(f"there is no checkpoint {knobs.resume_from}; resume takes auto, none or its path")
        if inside := paths(knobs.resume_from):
            raise CheckpointError(f"{knobs.resume_from} is a run: name one of its checkpoints, such as {inside[-1]}")
        _verify_state(knobs.resume_from)
        _compare_metadata(knobs.resume_from, _read_state(knobs.resume_from), metadata)
    if not found:
        return
    if knobs.resume == "none" and not restarts:
        raise CheckpointError(f"{run} holds a run up to {found[-1].name}: resume it with auto, or choose another out")
    _, state = _newest_state(run) or (None, {})
    for name, asked in ("resume", knobs.resume_from), ("init_from", knobs.init_from):
        if asked is not None and not any(spelling in _beginning(state)[name] for spelling in _spellings(asked)):
            raise CheckpointError(
                f"{run} holds a run up to {found[-1].name} that did not begin with {name} {asked}: leave {name} away "
                "to continue it, or choose another out"
            )


def _beginning(state: dict[str, Any]) -> dict[str, list[str]]:
    """{"resume": spellings, "init_from": spellings} of what the run of a state began with, empty lists for nothing."""
    if "began_with" in state:
        return state["began_with"]
    config = state.get("config")  # of the command that wrote it: of the first checkpoint, that which began the run
    given = config if isinstance(config, dict) else {}
    resume, init_from = given.get("resume"), given.get("init_from")
    return {
        "resume": _spellings(Path(resume)) if isinstance(resume, str) and resume not in ("auto", "none") else [],
        "init_from": _spellings(Path(init_from)) if isinstance(init_from, str) else [],
    }


def _spellings(path: Path) -> list[str]:
    """The path as it was given, by which a command is known again where all was moved, and its one absolute form."""
    home_spelled_out = os.path.expanduser(path)
    return [home_spelled_out, os.path.realpath(home_spelled_out)]


def _newest_state(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose state.json is sound, and what that holds; None if there is no checkpoint.

    Raises DamagedCheckpointError if a state.json is what was written, but not by fastlm, and none is sound.
    """
    refused = None
    for path in reversed(paths(run)):
        with contextlib.suppress(DamagedCheckpointError):
            _verify_state(path)
            try:
                return path, _read_state(path)
            except DamagedCheckpointError as error:
                refused = refused or error
    if refused:
        raise refused
    return None


def _verify_state(path: Path) -> None:
    _verify_file(path / "state.json", _read_sums(path)["state.json"])


def _compare_metadata(path: Path, state: dict[str, Any], metadata: dict[str, Any]) -> None:
    for key, was, now in differences(state["metadata"], metadata):
        raise CheckpointError(
            f"{path} was trained with {key} = {was!r}, and this run has {now!r}: use the same, or another run directory"
        )


def differences(saved: dict[str, Any], current: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, saved value, current value) for each difference of two nested dicts, as JSON sees them."""
    current = json.loads(json.dumps(current))
    for key in sorted(saved.keys() | current.keys()):
        was, now = saved.get(key), current.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from differences(was, now, f"{prefix}{key}.")
        elif was != now:
            yield prefix + key, was, now


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
                if _ASIDE.fullmatch(leftover.name):
                    with contextlib.suppress(OSError):
                        _remove(leftover)
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
        plain, extras[group] = _divided(values)
        stand_ins = {name: shards.local(tensor).new_empty(0) for name, tensor in plain.items()}
        try:
            unsaved = stand_ins.keys() - safetensors.torch.load(safetensors.torch.save(stand_ins)).keys()
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(f"no checkpoint can hold the {group}'s tensors: {error}") from error
        if unsaved:
            raise CheckpointError(f"no checkpoint can hold a tensor named {sorted(unsaved)[0]!r}: rename it")
    unpacked = _unpacked(_packed(extras))
    return {group: values | unpacked[group] for group, values in tensors.items()}


def require_space(run: Path, num_bytes: int) -> None:
    """Raise OSError unless the run's disk has room for a checkpoint of num_bytes."""
    free = shutil.disk_usage(run).free
    if free < num_bytes:
        raise OSError(
            f"the disk of {run} has {free / 1e9:.2f} GB free and a checkpoint takes {num_bytes / 1e9:.2f} GB: "
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
    partial = _partial(final)
    with ranks.fail_together(), _clearing_up(final):
        groups = {name: _Group.of(values) for name, values in tensors.items()}
        extra = {name: group.extra for name, group in groups.items() if group.extra}
        packed = _packed(extra) if extra and ranks.is_main else b""
        if ranks.is_main:
            require_space(run, sum(group.nbytes for group in groups.values()) + len(packed))
            _remove(partial)
            partial.mkdir()
    with ranks.fail_together(), _clearing_up(final):
        _write_json(partial / rank_file(ranks.rank), rank_state)
    for name, group in groups.items():
        if group.is_sharded:  # on all ranks, or on none
            with ranks.fail_together(), _clearing_up(final):
                shards.write(partial / name, group.plain)
    with ranks.fail_together(), _clearing_up(final):
        if ranks.is_main:
            for name, group in groups.items():
                if not group.is_sharded:
                    _write_tensors(partial / _group_file(name), group.plain)
            if packed:
                (partial / _EXTRA).write_bytes(packed)
            described = {
                name: {"num_tensors": len(tensors[name]), "aliases": group.aliases} for name, group in groups.items()
            }
            _, earlier = _newest_state(run) or (None, state)
            began_with = _beginning(earlier)
            shared = {"step": step, "world_size": ranks.world_size, "groups": described, "began_with": began_with}
            _write_json(partial / "state.json", state | shared)
            _seal(partial, final)
    return final


def retain(run: Path, newest: int, *, every: int = 0, last_step: int | None = None) -> None:
    """Delete all checkpoints but the newest ones, those of steps that are multiples of every, and two besides.

    These are the one with the lowest held-out loss, and the newest whose loss was finite: a run whose loss is NaN for
    many checkpoints keeps the last good one. A checkpoint was verified when it was written or resumed from, and those
    of this run that are older than it are deleted only then.

    last_step  where training is; a checkpoint beyond it was damaged when the run was resumed: it stays, and does not
               count, or the sound ones before it would be deleted for its sake
    """
    found = [path for path in paths(run) if last_step is None or _step_of(path) <= last_step]
    keep = {*found[-newest:], best(run), next(filter(_loss_was_finite, reversed(found)), None)}
    for path in found:
        if path not in keep and not (every and _step_of(path) % every == 0):
            _delete(path)


@contextlib.contextmanager
def _clearing_up(final: Path) -> Iterator[None]:
    """Turn a failure to write into one clear OSError; nothing stays half-done, not even after an interrupt."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):
            _remove(_partial(final))
        if isinstance(error, (OSError, SafetensorError)):
            raise OSError(f"cannot save the checkpoint {final}: {error}; earlier checkpoints are untouched") from error
        raise


def _seal(partial: Path, final: Path) -> None:
    """Checksum and sync every file, then give the directory its name: the moment the checkpoint exists."""
    names = sorted(_files_in(partial))
    (partial / _SUMS).write_text("".join(f"{_sha256(partial / name)}  {name}\n" for name in names))
    mode = (partial / _SUMS).stat().st_mode
    for name in names:
        (partial / name).chmod(mode)  # safetensors lets nobody but the owner read, whatever the umask
    for path in [*partial.rglob("*"), partial]:
        _sync(path)
    if os.path.lexists(final):  # damaged, or no checkpoint at all, else this step would not be written again
        _delete(final)
    partial.rename(final)
    _sync(final.parent)


def _delete(path: Path) -> None:
    doomed = path.with_name(f".{path.name}.deleted")
    _remove(doomed)
    path.rename(doomed)  # without this a kill in the middle of the deletion leaves a damaged checkpoint
    _remove(doomed)


def _remove(path: Path) -> None:
    """Delete what bears the name, be it a directory, a file or a link; what a link points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _files_in(path: Path) -> Iterable[str]:
    """Names of all files in the checkpoint, also in its folders; a link counts as a file, whatever it points to."""
    found = (file for file in path.rglob("*") if file.is_symlink() or not file.is_dir())
    return [file.relative_to(path).as_posix() for file in found]


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _group_file(group: str) -> str:
    return f"{group}.safetensors"


@dataclasses.dataclass(frozen=True)
class _Group:
    """A group of tensors as it is written: each storage once, and apart what safetensors cannot hold."""

    plain: dict[str, Tensor]
    aliases: dict[str, str]  # {name that is left out: name of the same tensor}
    extra: dict[str, Any]

    @classmethod
    def of(cls, values: dict[str, Any]) -> "_Group":
        plain, extra = _divided(values)
        return cls(*_without_aliases(plain), extra)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.plain.values())

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold parts of it: then each writes its own."""
        return any(shards.is_sharded(tensor) for tensor in self.plain.values())


def _read_group(
    path: Path,
    name: str,
    described: dict[str, Any],
    extra: dict[str, dict[str, Any]],
    sharded: Mapping[str, "DTensor"],
) -> dict[str, Any]:
    if (path / name).is_dir():
        values: dict[str, Any] = dict(shards.read(path / name, sharded))
    else:
        whole = _read_tensors(path / _group_file(name))
        values = {key: shards.shared_out(key, tensor, sharded) for key, tensor in whole.items()}
    values |= extra.get(name, {})
    values |= {alias: values[original] for alias, original in described["aliases"].items()}
    if len(values) != described["num_tensors"]:
        raise ValueError(f"the group {name} has {len(values)} tensors of {described['num_tensors']}")
    return values


def _divided(values: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(what safetensors can hold, what torch.save must): the second is other values than dense tensors, and dtypes."""
    plain = {name: value for name, value in values.items() if _is_plain(value)}
    return plain, {name: value for name, value in values.items() if name not in plain}


def _is_plain(value: Any) -> bool:
    return (
        (type(value) in (Tensor, nn.Parameter) or shards.is_sharded(value))
        and value.layout == torch.strided
        and not value.is_nested
        and value.device.type != "meta"
        and _safetensors_hold(value.dtype)
    )


@functools.cache
def _safetensors_hold(dtype: torch.dtype) -> bool:
    """Whether a tensor comes back: some dtypes are refused, others are written and cannot be read."""
    try:
        saved = safetensors.torch.save({"x": torch.empty(0, dtype=dtype)})
        return safetensors.torch.load(saved)["x"].dtype == dtype
    except (KeyError, ValueError, RuntimeError, SafetensorError):
        return False


def _without_aliases(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors with each storage once, {left out name: name that holds the same}): tied weights are saved once."""
    first: dict[tuple, str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        here = shards.local(tensor)
        bits = here.dtype, here.is_conj(), here.is_neg()
        # of the storage: the local part of a tied weight may be empty, and all ranks must find the same aliases
        start = (here.untyped_storage().data_ptr(), here.storage_offset())
        place = (start, here.shape, here.stride(), here.device, bits)
        if here.untyped_storage().nbytes() and place in first:
            aliases[name] = first[place]
        else:
            first[place] = name
    return {name: tensors[name] for name in tensors if name not in aliases}, aliases


def _packed(values: dict[str, dict[str, Any]]) -> bytes:
    """The values as torch.save writes them. Raises CheckpointError, naming the first that could not be read again."""
    for group, named in values.items():
        for name, value in named.items():
            try:
                _unpacked(_saved_by_torch(value))
            except Exception as error:  # of whatever class the value's own code raises
                kind = f"tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
                raise CheckpointError(
                    f"no checkpoint can hold {name!r} of the {group}, a {kind}: expected tensors of dtypes that "
                    "PyTorch saves, numbers, text, bytes, NumPy arrays, or dicts, lists, tuples and sets of them"
                ) from error
    return _saved_by_torch(values)


def _saved_by_torch(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(data: bytes) -> Any:
    with torch.serialization.safe_globals(_HARMLESS):
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write each tensor, whatever its strides, and though it shares memory with another."""
    alone, taken = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.resolve_conj().resolve_neg().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        alone[name] = tensor.to("cpu", copy=True) if storage in taken else tensor  # safetensors refuses to share
        taken.add(storage)
    safetensors.torch.save_file(alone, path, metadata={"format": "pt"})


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if os.fsencode(path).decode(errors="ignore") != str(path):  # PyTorch maps no file whose name is not UTF-8
        return safetensors.torch.load(path.read_bytes())
    return safetensors.torch.load_file(path)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value))


def _read_json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds a JSON {type(value).__name__}, expected an object")
    return value


def _read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint; its checksum holds, so where it is not what write makes, someone else made it."""
    try:
        state = _read_json(path / "state.json")
        for key, kind in ("step", int), ("world_size", int), ("metadata", dict), ("groups", dict):
            if type(state[key]) is not kind:
                raise ValueError(f"{key!r} is {state[key]!r}")
        began = state.get("began_with", {"resume": [], "init_from": []})  # older checkpoints lack it
        if type(began) is not dict or any(type(began.get(name)) is not list for name in ("resume", "init_from")):
            raise ValueError(f"'began_with' is {began!r}")
        if _step_of(path) not in (-1, state["step"]):
            raise ValueError(f"'step' is {state['step']}")
    except (OSError, ValueError, KeyError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise DamagedCheckpointError(f"{path / 'state.json'} is not one that fastlm writes: {reason}") from error
    return state


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open directories
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify_file(file: Path, digest: str) -> None:
    if not os.path.isfile(file):
        raise DamagedCheckpointError(f"{file} is missing")
    try:
        if _sha256(file) != digest:
            raise DamagedCheckpointError(f"{file} is damaged: its SHA-256 is not the one in {_SUMS}")
    except OSError as error:  # a bad sector, say: an earlier checkpoint may be whole
        raise DamagedCheckpointError(f"{file} cannot be read: {error.strerror}") from error


def _read_sums(path: Path) -> dict[str, str]:
    """{file name: SHA-256} of a checkpoint; raises CheckpointError if the list itself is damaged."""
    try:
        lines = (path / _SUMS).read_text().splitlines()
        sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    except (OSError, ValueError):
        raise DamagedCheckpointError(f"{path / _SUMS} is missing or damaged") from None
    for unlisted in {"state.json", *_files_in(path)} - {_SUMS, *sums}:
        raise DamagedCheckpointError(f"{path / _SUMS} is damaged: it does not list {unlisted}")
    return sums


def _loss_was_finite(path: Path) -> bool:
    """Whether the step before the checkpoint had a finite loss and gradient."""
    try:
        return _read_state(path)["loss_is_finite"] is True
    except (DamagedCheckpointError, KeyError):
        return False


def _held_out_loss(path: Path) -> float | None:
    try:
        loss = _read_state(path)["eval_loss"]
        return loss if isinstance(loss, float) and math.isfinite(loss) else None
    except (DamagedCheckpointError, KeyError):
        return None  # damaged: verify says so where it matters
