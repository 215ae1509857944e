"""Checkpoints that survive kill -9, full disks and flipped bits, and whose loading runs no code from the file.

    <run>/checkpoints/step-00000100/
        model.safetensors        weights, each storage once
        optimizer.safetensors    <parameter>/<quantity>
        state.json               step, metadata, config, scaler, held-out loss, aliases of shared weights
        rank-00000.json          per rank: random generators, loader position
        SHA256SUMS               checksums of all the above; `sha256sum -c SHA256SUMS` checks them too

A checkpoint is written into a hidden directory beside, every file is synced, and the directory is then renamed: a name
that starts with "step-" is always complete. Without the syncs a power cut could leave the name without the bytes.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastlm.train.distributed import Ranks
from fastlm.train.run_lock import RunInUseError, locked

_SUMS = "SHA256SUMS"


class CheckpointError(ValueError):
    """A checkpoint is absent, damaged or not of this run."""


class DamagedCheckpointError(CheckpointError):
    """A file of the checkpoint is missing or not what was written."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: state_dict of the model, tensors of the optimiser, and JSON values."""

    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    rank_state: dict[str, Any]

    @property
    def metadata(self) -> dict[str, Any]:
        return self.state["metadata"]


# Finding


def paths(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if path.name.removeprefix("step-").isdecimal())


def path_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return run / "checkpoints" / f"step-{step:08d}"


def best(run: Path) -> Path | None:
    """The checkpoint with the lowest held-out loss, or None if no checkpoint was evaluated."""
    losses = {path: loss for path in paths(run) if (loss := _held_out_loss(path)) is not None}
    return min(losses, key=losses.__getitem__, default=None)


# Reading


def read_newest(run: Path, *, on_line: Callable[[str], None] = lambda line: None) -> Checkpoint | None:
    """The newest checkpoint that is not damaged, telling on_line of each newer one that is; None if there is none.

    Raises CheckpointError if there are checkpoints and all are damaged, because to start afresh would overwrite what
    could perhaps be rescued.
    """
    for path in reversed(paths(run)):
        try:
            return read(path)
        except DamagedCheckpointError as error:
            on_line(f"skipped a damaged checkpoint: {error}")
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
        state, rank_state = _read_state(path), _read_json(path / _rank_file(rank))
        model = load_file(path / "model.safetensors")
        model |= {alias: model[name] for alias, name in state["aliases"].items()}
        optimizer = load_file(path / "optimizer.safetensors")
    except DamagedCheckpointError:
        raise
    except (FileNotFoundError, ValueError, KeyError, SafetensorError) as error:
        raise DamagedCheckpointError(f"{path} is not a checkpoint that fastlm writes: {error}") from None
    return Checkpoint(path, model, optimizer, state, rank_state)


def verify(path: Path) -> None:
    """Raise DamagedCheckpointError, naming the file, unless every file of the checkpoint is what was written."""
    for name, digest in _read_sums(path).items():
        _verify_file(path / name, digest)


def check_metadata(run: Path, metadata: dict[str, Any]) -> None:
    """Raise CheckpointError, naming both values, at the first fact in which metadata differs from that of the run.

    Reads but one small file, so that a mistake is told before a model is loaded or anything is written.
    """
    for path in reversed(paths(run)):
        with contextlib.suppress(DamagedCheckpointError):
            _verify_file(path / "state.json", _read_sums(path)["state.json"])
            break
    else:
        return
    for key, was, now in differences(_read_state(path)["metadata"], metadata):
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
            probe = run / "checkpoints" / ".probe"
            probe.touch()
            probe.unlink()
            for leftover in (run / "checkpoints").glob(".step-*"):
                shutil.rmtree(leftover)
    except RunInUseError:
        raise
    except OSError as error:
        raise OSError(f"cannot write to the run directory {run}: {error.strerror}; choose another with out") from error


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
    model: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    state: dict[str, Any],
    rank_state: dict[str, Any],
    ranks: Ranks,
) -> Path:
    """Write the checkpoint of a step; every rank calls this, and returns once the checkpoint is complete.

    Raises OSError if it cannot be written; earlier checkpoints are then untouched.
    """
    final = path_of(run, step)
    partial = _partial(final)
    tensors, aliases = _without_aliases(model)
    if ranks.is_main:
        shutil.rmtree(partial, ignore_errors=True)
    state = state | {"step": step, "aliases": aliases}
    with ranks.together(), _clearing_up(final):
        if ranks.is_main:
            require_space(run, sum(t.nbytes for t in [*tensors.values(), *optimizer.values()]))
            partial.mkdir()
    with ranks.together(), _clearing_up(final):
        _write_json(partial / _rank_file(ranks.rank), rank_state)
    with ranks.together(), _clearing_up(final):
        if ranks.is_main:
            _write_tensors(partial / "model.safetensors", tensors)
            _write_tensors(partial / "optimizer.safetensors", optimizer)
            _write_json(partial / "state.json", state)
            _seal(partial, final)
    return final


def retain(run: Path, newest: int) -> None:
    """Delete all checkpoints but the newest ones and the best."""
    keep = {*paths(run)[-newest:], best(run)}
    for path in paths(run):
        if path not in keep:
            _delete(path)


@contextlib.contextmanager
def _clearing_up(final: Path) -> Iterator[None]:
    """Turn a failure to write into one clear OSError that leaves nothing half-done."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(_partial(final), ignore_errors=True)
        raise OSError(f"cannot save the checkpoint {final}: {error}; earlier checkpoints are untouched") from error


def _seal(partial: Path, final: Path) -> None:
    """Checksum and sync every file, then give the directory its name: the moment the checkpoint exists."""
    sums = "".join(f"{_sha256(file)}  {file.name}\n" for file in sorted(partial.iterdir()))
    (partial / _SUMS).write_text(sums)
    mode = (partial / _SUMS).stat().st_mode
    for file in partial.iterdir():
        file.chmod(mode)  # safetensors lets nobody but the owner read, whatever the umask
    for path in [*partial.iterdir(), partial]:
        _sync(path)
    if final.exists():  # a damaged one that was skipped at resume, else this step would not be written again
        _delete(final)
    partial.rename(final)
    _sync(final.parent)


def _delete(path: Path) -> None:
    doomed = path.with_name(f".{path.name}.deleted")
    path.rename(doomed)  # without this a kill in the middle of the deletion leaves a damaged checkpoint
    shutil.rmtree(doomed)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _without_aliases(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors with each storage once, {left out name: name that holds the same}): tied weights are saved once."""
    first: dict[tuple, str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device)
        if tensor.numel() and place in first:
            aliases[name] = first[place]
        else:
            first[place] = name
    return {name: tensors[name].contiguous() for name in tensors if name not in aliases}, aliases


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


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
        if [type(state[key]) for key in ("step", "metadata", "aliases")] == [int, dict, dict]:
            return state
    except (ValueError, KeyError, TypeError):
        pass
    raise DamagedCheckpointError(f"{path / 'state.json'} is not one that fastlm writes")


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
    if not file.is_file():
        raise DamagedCheckpointError(f"{file} is missing")
    if _sha256(file) != digest:
        raise DamagedCheckpointError(f"{file} is damaged: its SHA-256 is not the one in {_SUMS}")


def _read_sums(path: Path) -> dict[str, str]:
    """{file name: SHA-256} of a checkpoint; raises CheckpointError if the list itself is damaged."""
    try:
        lines = (path / _SUMS).read_text().splitlines()
        sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    except (OSError, ValueError):
        raise DamagedCheckpointError(f"{path / _SUMS} is missing or damaged") from None
    if not {"model.safetensors", "optimizer.safetensors", "state.json"} <= sums.keys():
        raise DamagedCheckpointError(f"{path / _SUMS} is damaged: it does not list every file")
    return sums


def _held_out_loss(path: Path) -> float | None:
    try:
        loss = _read_json(path / "state.json")["eval_loss"]
        return loss if isinstance(loss, float) and math.isfinite(loss) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # damaged: verify says so where it matters
