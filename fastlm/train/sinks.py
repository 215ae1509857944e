"""Where the records of a run go besides metrics.jsonl: TensorBoard, Weights & Biases, trackio.

    <run>/tensorboard/       TensorBoard's event files
    <run>/wandb/             Weights & Biases' files; without a key or a network they wait there for `wandb sync`
    <run>/tracking-id.txt    the name by which wandb and trackio know this run

Each is optional, and none may hold training up or end it: what is not installed or fails is told in one line. A resumed
run goes on in the same curves: TensorBoard hides the steps beyond the checkpoint, which are written again; wandb keeps
what it got first; trackio keeps both.
"""

import contextlib
import dataclasses
import functools
import io
import math
import netrc
import re
import socket
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from fastlm.files import atomic_write

Tracker = Literal["tensorboard", "wandb", "trackio"]

PROJECT = "fastlm"
ID_FILE = "tracking-id.txt"
CONNECT_SECONDS, START_SECONDS, FINISH_SECONDS = 3.0, 30.0, 60.0  # after which a server is gone on without


class Sink(Protocol):
    """Where records go. Each has an integer "step"; the other values are numbers, None, or dicts of them."""

    name: str

    def write(self, record: dict[str, Any]) -> None:
        """Take a record. Raises an error of any class if it could not be kept."""

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run."""

    path: Path
    facts: dict[str, Any]  # of run.json
    first_step: int  # 0 for a new run, else where it is resumed

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @functools.cached_property
    def identity(self) -> str:
        """The name of this run among all others: a new one for a new run, the saved one for a resumed run."""
        path = self.path / ID_FILE
        saved = path.read_text("utf-8", errors="replace").strip() if path.exists() else ""
        if self.first_step and re.fullmatch("[0-9a-f]{8}", saved):
            return saved
        made = uuid.uuid4().hex[:8]
        with atomic_write(path) as file:
            file.write(f"{made}\n".encode())
        return made


def open_sinks(trackers: Sequence[Tracker], run: TrackedRun, on_log: Callable[[str], None]) -> list[Sink]:
    """The sinks of those trackers that can be opened; each tracker is told of in one line."""
    opened: list[Sink] = []
    for tracker in trackers:
        try:
            sink = OPENED_BY[tracker](run)
        except ImportError as error:
            on_log(f"{tracker} is left out: {reason(error)}; pip install {tracker}")
        except Exception as error:  # these libraries raise what they like
            on_log(f"{tracker} is left out: {reason(error)}")
        else:
            opened.append(sink)
            on_log(f"{tracker}: {sink.where}")
    return opened


def reason(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """{tag: number} of a record: train/loss, eval/loss, layers/blocks.0/grad_norm; what is not finite is left out."""
    found = {}
    for path, value in leaves(record):
        name = "/".join(path)
        if len(path) == 1:
            name = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
        if path != ("step",) and isinstance(value, (int, float)) and math.isfinite(value):
            found[name] = float(value)
    return found


def leaves(value: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(keys, value) of every value of nested dicts that is no dict."""
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from leaves(inner, (*path, key))
        else:
            yield (*path, key), inner


class TensorBoardSink:
    """Event files, written by PyTorch's own SummaryWriter in a thread of its own."""

    name = "tensorboard"

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder, first_step = run.path / "tensorboard", run.first_step
        self.where = f"tensorboard --logdir {folder}"
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)
        settings = "".join(f"    {'.'.join(path)} = {value!r}\n" for path, value in leaves(run.facts))
        self._writer.add_text("run", settings, first_step)

    def write(self, record: dict[str, Any]) -> None:
        for tag, value in scalars(record).items():
            self._writer.add_scalar(tag, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Weights & Biases: online where its own settings and the network allow, else into files for `wandb sync`."""

    name = "wandb"

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        theirs = wandb.setup().settings
        is_online = theirs.mode == "online" and _has_key(theirs) and _answers(theirs.base_url)
        ours = {"silent": True, "console": "off", "init_timeout": START_SECONDS, "finish_timeout": FINISH_SECONDS}
        self._run = wandb.init(
            project=theirs.project or PROJECT,
            name=run.name,
            id=run.identity,
            dir=str(run.path),
            config=run.facts,
            resume="allow" if is_online else None,
            mode="online" if is_online else "disabled" if theirs.mode == "disabled" else "offline",
            settings=wandb.Settings(**{key: value for key, value in ours.items() if hasattr(theirs, key)}),
        )
        offline = f"offline; to upload it later: wandb sync {Path(self._run.dir).parent}"
        self.where = self._run.url if is_online else offline

    def write(self, record: dict[str, Any]) -> None:
        self._run.log(scalars(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


class TrackioSink:
    """trackio: a database in the user's cache, or where its own variables say."""

    name = "trackio"

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self._trackio = trackio
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a page of advice
            self._run = trackio.init(
                project=PROJECT, name=f"{run.name}-{run.identity}", config=run.facts, resume="allow"
            )
        self.where = f"trackio show --project {PROJECT}"

    def write(self, record: dict[str, Any]) -> None:
        self._run.log(scalars(record), step=record["step"])

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.finish()  # the run's own finish would be called once more, and print, at exit


OPENED_BY: dict[str, Any] = {"tensorboard": TensorBoardSink, "wandb": WandbSink, "trackio": TrackioSink}


def _has_key(settings: Any) -> bool:
    """Whether wandb can log in without asking, for which nobody may be there to answer."""
    if settings.api_key or getattr(settings, "identity_token_file", None):
        return True
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc().authenticators(urlsplit(settings.base_url).hostname or "") is not None
    return False


def _answers(url: str) -> bool:
    """Whether a server, or the proxy before it, takes a connection."""
    try:
        parts = urlsplit(urllib.request.getproxies().get(urlsplit(url).scheme, url))
        port = parts.port or (80 if parts.scheme == "http" else 443)
        socket.create_connection((parts.hostname or "", port), timeout=CONNECT_SECONDS).close()
        return True
    except (OSError, ValueError):
        return False
