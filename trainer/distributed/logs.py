"""Logging: rank 0 to the console, every rank to its own file."""

from __future__ import annotations

import logging
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from trainer.errors import ConfigError, Problem
from trainer.files import open_without_following_links
from trainer.sanitize import SafeFormatter


class _ConsoleHandler(logging.StreamHandler[TextIO]):
    """Handler that writes to the current `sys.stdout`, which a progress bar replaces to stay below the lines."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stdout


class _MinimumLevel(logging.Filter):
    """Filter by level. Unlike the level of a handler, other libraries cannot change it."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self._level = level

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= self._level


class _RankFileHandler(logging.FileHandler):
    """Handler of the log file of a rank. On a full disk it loses lines, after one warning, and never ends the run."""

    def __init__(self, path: Path) -> None:
        self._has_failed = False
        super().__init__(path, encoding="utf-8")

    def _open(self) -> TextIOWrapper:
        return TextIOWrapper(open(self.baseFilename, "ab", opener=open_without_following_links), encoding=self.encoding)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._has_failed:
            print(f"warning: {self.baseFilename}: log lines are lost: {error.strerror}", file=sys.stderr)
            self._has_failed = True


def _open_rank_file(folder: Path, rank: int) -> _RankFileHandler:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _RankFileHandler(folder / f"rank-{rank}.log")
    except OSError as error:
        reason = f"{folder}/rank-{rank}.log cannot be written: {error.strerror}"
        raise ConfigError(Problem("run.output_dir", reason, "Free some space, or use another directory")) from None


def configure_logging(rank: int, folder: Path | None = None) -> None:
    """Log to the console on rank 0 and, if `folder` is given, to `rank-N.log` in it on every rank.

    DeepSpeed's logger uses the same destinations, with errors only on the console. Each logger has its own handlers,
    because DeepSpeed changes the level of its handlers.
    """
    for name, console_level in (("trainer", logging.INFO), ("DeepSpeed", logging.ERROR)):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
        logger.propagate = False
        if name == "trainer":
            logger.setLevel(logging.INFO)
        if rank == 0:
            console = _ConsoleHandler()
            console.setFormatter(SafeFormatter("[tessera] %(message)s"))
            console.addFilter(_MinimumLevel(console_level))
            logger.addHandler(console)
        if folder is not None:
            file = _open_rank_file(folder, rank)
            file.setFormatter(SafeFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            logger.addHandler(file)
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())
