"""The directory of a checkpoint: its files, their checksums and its name, which it gets once it is complete.

It is written under a hidden name beside, every file is synced, and the directory is then renamed: a name that starts
with "step-" is always complete. Without the syncs a power cut could leave the name without the bytes. A link to such a
directory is a checkpoint too: where it is to be deleted the link goes, and what it points to stays.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fastlm.files import sync

SUMS = "SHA256SUMS"
_ASIDE = re.compile(r"\.(step-[0-9]+)(\.partial|\.deleted)?")  # what a killed process leaves


class CheckpointError(ValueError):
    """A checkpoint is absent, damaged or not of this run."""


class DamagedCheckpointError(CheckpointError):
    """A file of the checkpoint is missing or not what was written."""


# Names


def step_of(path: Path) -> int:
    """The step that the name of a checkpoint tells, or -1 where path_of gives no such name."""
    digits = re.fullmatch(r"step-([0-9]+)", path.name)
    return int(digits[1]) if digits and path.name == f"step-{int(digits[1]):08d}" else -1


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def partial_path(path: Path) -> Path:
    """Where the checkpoint is while it is written."""
    return path.with_name(f".{path.name}.partial")


def is_leftover(path: Path) -> bool:
    """Whether a process that was killed may have left this."""
    return _ASIDE.fullmatch(path.name) is not None


# Checksums


def verify(path: Path) -> None:
    """Raise DamagedCheckpointError, naming the file, unless every file of the checkpoint is what was written."""
    for name, digest in _read_sums(path).items():
        _verify_file(path / name, digest)


def verify_state(path: Path) -> None:
    """As verify, of state.json alone."""
    _verify_file(path / "state.json", _read_sums(path)["state.json"])


def _verify_file(file: Path, digest: str) -> None:
    if not os.path.isfile(file):
        raise DamagedCheckpointError(f"{file} is missing")
    try:
        if _sha256(file) != digest:
            raise DamagedCheckpointError(f"{file} is damaged: its SHA-256 is not the one in {SUMS}")
    except OSError as error:  # a bad sector, say: an earlier checkpoint may be whole
        raise DamagedCheckpointError(f"{file} cannot be read: {error.strerror}") from error


def _read_sums(path: Path) -> dict[str, str]:
    """{file name: SHA-256} of a checkpoint; raises CheckpointError if the list itself is damaged."""
    try:
        lines = (path / SUMS).read_text().splitlines()
        sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    except (OSError, ValueError):
        raise DamagedCheckpointError(f"{path / SUMS} is missing or damaged") from None
    for unlisted in {"state.json", *_files_in(path)} - {SUMS, *sums}:
        raise DamagedCheckpointError(f"{path / SUMS} is damaged: it does not list {unlisted}")
    return sums


def _files_in(path: Path) -> Iterable[str]:
    """Names of all files in the checkpoint, also in its folders; a link counts as a file, whatever it points to."""
    found = (file for file in path.rglob("*") if file.is_symlink() or not file.is_dir())
    return [file.relative_to(path).as_posix() for file in found]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# JSON


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value))


def read_json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds a JSON {type(value).__name__}, expected an object")
    return value


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint; its checksum holds, so where it is not what write makes, someone else made it."""
    try:
        state = read_json(path / "state.json")
        for key, kind in ("step", int), ("world_size", int), ("metadata", dict), ("groups", dict):
            if type(state[key]) is not kind:
                raise ValueError(f"{key!r} is {state[key]!r}")
        began = state.get("began_with", {"resume": [], "init_from": []})  # older checkpoints lack it
        if type(began) is not dict or any(type(began.get(name)) is not list for name in ("resume", "init_from")):
            raise ValueError(f"'began_with' is {began!r}")
        if step_of(path) not in (-1, state["step"]):
            raise ValueError(f"'step' is {state['step']}")
    except (OSError, ValueError, KeyError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise DamagedCheckpointError(f"{path / 'state.json'} is not one that fastlm writes: {reason}") from error
    return state


def differences(saved: dict[str, Any], current: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, saved value, current value) for each difference of two nested dicts, as JSON sees them."""
    current = json.loads(json.dumps(current))
    for key in sorted(saved.keys() | current.keys()):
        was, now = saved.get(key), current.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from differences(was, now, f"{prefix}{key}.")
        elif was != now:
            yield prefix + key, was, now


# Writing and deleting


@contextlib.contextmanager
def clearing_up(final: Path) -> Iterator[None]:
    """Turn a failure to write into one clear OSError; nothing stays half-done, not even after an interrupt."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):
            remove(partial_path(final))
        if isinstance(error, (OSError, SafetensorError)):
            raise OSError(f"cannot save the checkpoint {final}: {error}; earlier checkpoints are untouched") from error
        raise


def seal(partial: Path, final: Path) -> None:
    """Checksum and sync every file, then give the directory its name: the moment the checkpoint exists."""
    names = sorted(_files_in(partial))
    (partial / SUMS).write_text("".join(f"{_sha256(partial / name)}  {name}\n" for name in names))
    mode = (partial / SUMS).stat().st_mode
    for name in names:
        (partial / name).chmod(mode)  # safetensors lets nobody but the owner read, whatever the umask
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    aside = _aside(final)
    is_replaced = os.path.lexists(final)  # damaged, no checkpoint at all, or without the evaluation that it has now
    if is_replaced:
        remove(aside)
        final.rename(aside)  # not deleted before the new one has its name: it may be the only one
    partial.rename(final)
    sync(final.parent)
    if is_replaced:
        with contextlib.suppress(OSError):  # prepare deletes it
            remove(aside)


def delete(path: Path) -> None:
    """Delete a checkpoint; it loses its name first, or a kill in the middle would leave a damaged one."""
    aside = _aside(path)
    remove(aside)
    path.rename(aside)
    remove(aside)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.deleted")


def remove(path: Path) -> None:
    """Delete what bears the name, be it a directory, a file or a link; what a link points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
