"""Checkpoints that survive kill -9, full disks and flipped bits, and whose loading runs no code from the file.

    <run>/checkpoints/step-00000100/
        model.safetensors        weights, each storage once
        optimizer.safetensors    <parameter>/<quantity>
        extra.pt                 only if safetensors cannot hold all of it: extra states, rare dtypes, sparse tensors
        state.json               step, metadata, config, loss scale, held-out loss; per group, its size and aliases
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fastlm.train.distributed import Ranks
from fastlm.train.knobs import Knobs
from fastlm.train.run_lock import RunInUseError, locked

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
    """Newest checkpoints to keep; the one with the lowest held-out loss is kept besides."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_integers("checkpoint_interval", minimum=0)
        self.check_integers("keep_checkpoints", minimum=1)


class CheckpointError(ValueError):
    """A checkpoint is absent, damaged or not of this run."""


class DamagedCheckpointError(CheckpointError):
    """A file of the checkpoint is missing or not what was written."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: named groups of tensors, and JSON values.

    The group "model" is the model's state_dict, in which there may be what the modules' get_extra_state gave.
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


def read_newest(run: Path, *, on_log: Callable[[str], None] = lambda line: None) -> Checkpoint | None:
    """The newest checkpoint that is not damaged, telling on_log of each newer one that is; None if there is none.

    Raises CheckpointError if there are checkpoints and all are damaged, because to start afresh would overwrite what
    could perhaps be rescued.
    """
    for path in reversed(paths(run)):
        try:
            return read(path)
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


def read(path: Path, *, rank: int = 0) -> Checkpoint:
    """Load a checkpoint onto the CPU after verifying its checksums.

    Raises DamagedCheckpointError if a file is missing, altered or not one that write makes, CheckpointError if there is
    no such checkpoint.
    """
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint {path}")
    verify(path)
    try:
        state, rank_state = _read_state(path), _read_json(path / rank_file(rank))
        extra = _unpacked((path / _EXTRA).read_bytes()) if (path / _EXTRA).exists() else {}
        tensors = {name: _read_group(path, name, group, extra) for name, group in state["groups"].items()}
    except (DamagedCheckpointError, MemoryError):
        raise
    except Exception as error:  # the checksums hold, so whatever is wrong with the content, someone else made it
        reason = " ".join(str(error).split())
        raise DamagedCheckpointError(f"{path} is not a checkpoint that fastlm writes: {reason}") from error
    return Checkpoint(path, tensors, state, rank_state)


def verify(path: Path) -> None:
    """Raise DamagedCheckpointError, naming the file, unless every file of the checkpoint is what was written."""
    for name, digest in _read_sums(path).items():
        _verify_file(path / name, digest)


def check_metadata(run: Path, metadata: dict[str, Any]) -> None:
    """Raise CheckpointError, naming both values, at the first fact in which metadata differs from that of the run.

    Reads but one small file, so that a mistake is told before a model is loaded or anything is written.
    """
    refused = None
    for path in reversed(paths(run)):
        with contextlib.suppress(DamagedCheckpointError):
            _verify_file(path / "state.json", _read_sums(path)["state.json"])
            try:
                saved = _read_state(path)["metadata"]
                break
            except DamagedCheckpointError as error:
                refused = refused or error
    else:
        if refused:
            raise refused
        return
    for key, was, now in differences(saved, metadata):
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
    extras = {}
    for group, values in tensors.items():
        plain, extras[group] = _divided(values)
        stand_ins = {name: tensor.new_empty(0) for name, tensor in plain.items()}
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
        if ranks.is_main:
            groups = {name: _Group.of(values) for name, values in tensors.items()}
            extra = {name: group.extra for name, group in groups.items() if group.extra}
            packed = _packed(extra) if extra else b""
            require_space(run, sum(group.nbytes for group in groups.values()) + len(packed))
            _remove(partial)
            partial.mkdir()
    with ranks.fail_together(), _clearing_up(final):
        _write_json(partial / rank_file(ranks.rank), rank_state)
    with ranks.fail_together(), _clearing_up(final):
        if ranks.is_main:
            for name, group in groups.items():
                _write_tensors(partial / _group_file(name), group.plain)
            if packed:
                (partial / _EXTRA).write_bytes(packed)
            described = {
                name: {"num_tensors": len(tensors[name]), "aliases": group.aliases} for name, group in groups.items()
            }
            _write_json(partial / "state.json", state | {"step": step, "groups": described})
            _seal(partial, final)
    return final


def retain(run: Path, newest: int, *, last_step: int | None = None) -> None:
    """Delete all checkpoints but the newest ones and the best.

    last_step  where training is; a checkpoint beyond it was damaged when the run was resumed: it stays, and does not
               count, or the sound ones before it would be deleted for its sake
    """
    found = [path for path in paths(run) if last_step is None or _step_of(path) <= last_step]
    keep = {*found[-newest:], best(run)}
    for path in found:
        if path not in keep:
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
    sums = "".join(f"{_sha256(file)}  {file.name}\n" for file in sorted(partial.iterdir()))
    (partial / _SUMS).write_text(sums)
    mode = (partial / _SUMS).stat().st_mode
    for file in partial.iterdir():
        file.chmod(mode)  # safetensors lets nobody but the owner read, whatever the umask
    for path in [*partial.iterdir(), partial]:
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


def _read_group(path: Path, name: str, described: dict[str, Any], extra: dict[str, dict[str, Any]]) -> dict[str, Any]:
    values = _read_tensors(path / _group_file(name)) | extra.get(name, {})
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
        type(value) in (Tensor, nn.Parameter)
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
        bits = tensor.dtype, tensor.is_conj(), tensor.is_neg()
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device, bits)
        if tensor.numel() and place in first:
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
        for key, kind in ("step", int), ("metadata", dict), ("groups", dict):
            if type(state[key]) is not kind:
                raise ValueError(f"{key!r} is {state[key]!r}")
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
    for unlisted in {"state.json", *(file.name for file in path.iterdir())} - {_SUMS, *sums}:
        raise DamagedCheckpointError(f"{path / _SUMS} is damaged: it does not list {unlisted}")
    return sums


def _held_out_loss(path: Path) -> float | None:
    try:
        loss = _read_state(path)["eval_loss"]
        return loss if isinstance(loss, float) and math.isfinite(loss) else None
    except (DamagedCheckpointError, KeyError):
        return None  # damaged: verify says so where it matters
