"""`metrics.jsonl`: one JSON object a line, written without buffering."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path

from trainer.errors import ConfigError, Problem
from trainer.files import open_without_following_links
from trainer.tracking.interface import Row, TrackerContext

log = logging.getLogger(__name__)


def open_json_lines(context: TrackerContext) -> JsonLines:
    """Open `metrics.jsonl` of a run directory; it is always enabled."""
    return JsonLines(context.directory.metrics)


class JsonLines:
    """Appends rows to a file, so that a reader that follows the file sees every row at once.

    Rows that do not fit on the disk stay in memory, and every later row retries them. The tracker is not disabled,
    because this file is the only complete record of a run: once the disk has space, it must get all rows.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, and truncate a line that a killed process left incomplete.

        Raises:
            ConfigError: the file cannot be opened.
        """
        self._path = path
        self._unwritten = b""
        """Rows that are not in the file yet; part of the first one may be."""

        self._has_warned = False
        try:
            if path.exists():
                _truncate_torn_line(path)
            self._file = open(path, "ab", buffering=0, opener=open_without_following_links)  # noqa: SIM115
        except OSError as error:
            reason = f"{path} cannot be opened: {error.strerror}"
            raise ConfigError(Problem("run.output_dir", reason, "Free some space, or choose another folder")) from None

    def log(self, row: Row) -> None:
        """Append one row."""
        self._unwritten += json.dumps(json_safe(row), allow_nan=False).encode() + b"\n"
        self._write()

    def state(self) -> Mapping[str, str]:
        """Return no state: the file itself is continued."""
        return {}

    def close(self, exit_status: int) -> None:
        """Write the remaining rows, sync and close the file."""
        self._write()
        try:
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            log.warning("%s: not synced: %s", self._path, error.strerror)
        if self._unwritten:
            log.error("%s: lost the last %d rows", self._path, self._unwritten.count(b"\n"))

    def _write(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) or 0 :]
        except OSError as error:
            if not self._has_warned:
                log.warning(
                    "%s: rows cannot be written: %s. They are kept in memory and retried; training continues",
                    self._path,
                    error.strerror,
                )
            self._has_warned = True
            return
        if self._has_warned:
            log.info("%s: all rows are written again", self._path)
        self._has_warned = False


def json_safe(row: Row) -> Row:
    """Return `row` with null in place of NaN and infinity, which JSON lacks."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}


def _truncate_torn_line(path: Path) -> None:
    """Remove a last line that is incomplete, because the process that wrote it was killed."""
    with open(path, "rb+", opener=open_without_following_links) as file:
        file.truncate(file.read().rfind(b"\n") + 1)
