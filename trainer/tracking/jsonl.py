"""`metrics.jsonl`: one object a line, written at once, always."""

from __future__ import annotations

import json
import math
from pathlib import Path

from trainer.tracking.interface import Row


def plain(row: Row) -> Row:
    """`row` with what JSON cannot say (NaN, infinity) as null."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}


def _drop_torn_line(path: Path) -> None:
    """Cuts off the line that a killed process has not ended."""
    with path.open("rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


class JsonLines:
    """Appends to a file and flushes each line, so that whoever follows the file sees every step."""

    def __init__(self, path: Path) -> None:
        if path.exists():
            _drop_torn_line(path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, row: Row) -> None:
        self._file.write(json.dumps(plain(row), allow_nan=False) + "\n")
        self._file.flush()

    def close(self, exit_status: int) -> None:
        self._file.close()
