"""Files that appear whole or not at all."""

import os
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
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".unfinished-")
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
