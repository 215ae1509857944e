"""Child processes that may hang: each in a group of its own, its output in a file, ended when its time is up."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import ROOT

POLL_SECONDS = 0.2


class Child:
    """A started command; whoever starts one ends it."""

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": search, "PYTHONUNBUFFERED": "1", **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, seconds: float, watched: Path | None = None, idle_seconds: float = 0.0) -> int | None:
        """The exit code, or None once so many seconds are over, or no one has written the watched file for so long."""
        end = idle_since = time.monotonic()
        end += seconds
        written = _written(watched)
        while (now := time.monotonic()) < end:
            if (code := self._process.poll()) is not None:
                return code
            if watched and _written(watched) != written:
                written, idle_since = _written(watched), now
            if watched and now - idle_since > idle_seconds:
                return None
            time.sleep(POLL_SECONDS)
        return self._process.poll()

    def end(self) -> None:
        """End the process, and the compilers and workers that it started, if they are still there."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            # A process inside the GPU driver may not end before its kernel does; waiting for it would hang the rest.
            print(f"process {self._process.pid} does not end; going on without it", file=sys.stderr)


def _written(path: Path | None) -> float:
    return path.stat().st_mtime if path and path.exists() else 0.0
