"""metrics.jsonl and samples.jsonl: one JSON object per line, appended as training goes."""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends records to a file, after dropping those beyond last_step: a resumed run will write these again."""

    def __init__(self, path: Path, last_step: int) -> None:
        kept = [record for record in read_metrics(path) if record["step"] <= last_step] if path.exists() else []
        rewritten = path.with_name(path.name + ".partial")
        with _naming(rewritten):
            rewritten.write_text("".join(_line(record) for record in kept))
            os.replace(rewritten, path)
        self.name = path.name
        self._path, self._file = path, path.open("ab", buffering=0)  # a buffer would fail again when it is closed

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it is in the file when this returns. Raises OSError, naming the file, if it is not."""
        with _naming(self._path):
            self._file.write(_line(record).encode())

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records that such a file holds; a line that is none, such as a killed process leaves, is passed over."""
    records = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in an OSError that does not: that of a full disk."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from error


def _line(record: dict[str, Any]) -> str:
    return json.dumps(_finite(record)) + "\n"


def _finite(value: Any) -> Any:
    """The value with None for what is not finite: JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
