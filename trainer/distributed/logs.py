"""Logs: rank 0 on the console, every rank in a file of its own."""

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
    """Writes to what `sys.stdout` is at the time: a progress bar puts itself in its place and keeps below the lines."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stdout


class _MinimumLevel(logging.Filter):
    """A level that nobody else can set, unlike a handler's own."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self._level = level

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= self._level


class _RankFileHandler(logging.FileHandler):
    """A rank's own file. One on a full disk loses lines, with one warning, and never ends the run."""

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
            print(f"warning: {self.baseFilename}: lines are lost: {error.strerror}", file=sys.stderr)
            self._has_failed = True


def _open_rank_file(folder: Path, rank: int) -> _RankFileHandler:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _RankFileHandler(folder / f"rank-{rank}.log")
    except OSError as error:
        reason = f"{folder}/rank-{rank}.log cannot be written: {error.strerror}"
        raise ConfigError(Problem("run.output_dir", reason, "Free some space, or take another folder")) from None


def configure_logging(rank: int, folder: Path | None = None) -> None:
    """Rank 0 speaks on the console; with a `folder`, every rank writes its own `rank-N.log` there.

    DeepSpeed's logger goes to the same places, on the console with errors only. Each logger has handlers of
    its own, because DeepSpeed sets the level of its handlers.
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
