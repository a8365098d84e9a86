"""`metrics.jsonl`: one object a line, written at once, always."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path

from trainer.errors import ConfigError, Problem
from trainer.files import open_without_following_links
from trainer.tracking.interface import Row

log = logging.getLogger(__name__)


def json_safe(row: Row) -> Row:
    """`row` with what JSON cannot say (NaN, infinity) as null."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}


def _truncate_torn_line(path: Path) -> None:
    """Cuts off the line that a killed process has not ended."""
    with open(path, "rb+", opener=open_without_following_links) as file:
        file.truncate(file.read().rfind(b"\n") + 1)


class JsonLines:
    """Appends to a file and flushes each line, so that whoever follows the file sees every step.

    A line that does not fit on the disk is kept and tried again with the next one: training goes on.
    """

    def __init__(self, path: Path) -> None:
        """Raises:
        ConfigError: the file cannot be opened.
        """
        self._path = path
        self._unwritten = b""
        """What has not been written yet; its first line may have been written in part."""

        self._warned = False
        try:
            if path.exists():
                _truncate_torn_line(path)
            self._file = open(path, "ab", buffering=0, opener=open_without_following_links)  # noqa: SIM115
        except OSError as error:
            reason = f"{path} cannot be opened: {error.strerror}"
            raise ConfigError(Problem("run.output_dir", reason, "Free some space, or take another folder")) from None

    def log(self, row: Row) -> None:
        self._unwritten += json.dumps(json_safe(row), allow_nan=False).encode() + b"\n"
        self._write()

    def _write(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) or 0 :]
        except OSError as error:
            if not self._warned:
                log.warning("%s: rows cannot be written: %s. They are kept in memory and tried again; training goes on",
                            self._path, error.strerror)  # fmt: skip
            self._warned = True
            return
        if self._warned:
            log.info("%s: all rows are written again", self._path)
        self._warned = False

    def close(self, exit_status: int) -> None:
        self._write()
        try:
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            log.warning("%s: not synced: %s", self._path, error.strerror)
        if self._unwritten:
            log.error("%s: the last %d rows are lost", self._path, self._unwritten.count(b"\n"))
