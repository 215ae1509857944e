"""Files and directories that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write that takes its name only once it is complete and on the disk.

    It is written beside its final place (a rename across file systems is not atomic), synced (without that a power
    cut can leave the new name on an empty file), then renamed. If anything fails, nothing of it remains. Its name until
    then is short whatever the final one is, because that may be as long as the system allows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".unfinished-")
    except OSError as error:  # of a name that nobody gave
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        with os.fdopen(descriptor, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(descriptor)
        os.chmod(name, 0o644)  # a temporary file is readable by its owner alone
        os.replace(name, path)
    except OSError as error:
        if error.filename is None:  # a full disk is reported without saying where
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A directory to fill that takes its name only once all in it is complete and on the disk.

    It is filled beside its final place, synced and renamed; if anything fails, nothing of it remains. Raises
    FileExistsError, before anything is written, if there is anything in path already.
    """
    final = Path(os.path.realpath(path))  # a link to an empty directory stays a link
    if os.path.lexists(final) and not (final.is_dir() and not any(final.iterdir())):
        raise FileExistsError(f"{path}: there is something already; choose another directory, or delete this one first")
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial = Path(tempfile.mkdtemp(dir=final.parent, prefix=".unfinished-"))
    except OSError as error:  # of a name that nobody gave
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        yield partial
        for file in partial.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
            sync(file)
        partial.chmod(0o755)  # a temporary directory is open to its owner alone
        sync(partial)
        partial.rename(final)
        sync(final.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Put a file or directory on the disk: without it a power cut can leave a name without its bytes."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open directories
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
