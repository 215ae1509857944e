"""metrics.jsonl: one JSON object per log line, appended as training goes."""

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends records to a file, after dropping those beyond last_step: a resumed run will write these again."""

    def __init__(self, path: Path, last_step: int) -> None:
        kept = [record for record in read_metrics(path) if record["step"] <= last_step] if path.exists() else []
        rewritten = path.with_name(path.name + ".partial")
        rewritten.write_text("".join(_line(record) for record in kept))
        os.replace(rewritten, path)
        self._file = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it is in the file when this returns."""
        self._file.write(_line(record))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a line that is none, such as a killed process leaves, is passed over."""
    records = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def _line(record: dict[str, Any]) -> str:
    finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
    return json.dumps(finite) + "\n"  # JSON knows no NaN
