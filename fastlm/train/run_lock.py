"""One process at a time trains in a run directory: two would delete each other's half-written checkpoints."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

_held: set[Path] = set()


class RunInUseError(OSError):
    """Another process trains in the run directory."""


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Keep other processes out of a run directory; the system lifts the lock when this one dies, however it dies.

    A process that holds it may enter again. Raises RunInUseError at once if another holds it.
    """
    path = run.resolve() / ".lock"
    if sys.platform == "win32" or path in _held:  # no flock there
        yield
        return
    import fcntl

    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunInUseError(
                f"another process is training in {run}: wait for it, or choose another directory"
            ) from None
        except OSError:
            pass  # some network file systems know no locks: better unprotected there than not at all
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)
