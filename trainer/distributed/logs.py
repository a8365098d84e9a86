"""Logs: rank 0 on the console, every rank in a file of its own."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TextIO

from trainer.sanitize import SafeFormatter


class _Console(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stdout` is at the time: a progress bar puts itself in its place and keeps below the lines."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stdout


class _AtLeast(logging.Filter):
    """A level that nobody else can set, unlike a handler's own."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self._level = level

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= self._level


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
            console = _Console()
            console.setFormatter(SafeFormatter("[tessera] %(message)s"))
            console.addFilter(_AtLeast(console_level))
            logger.addHandler(console)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(folder / f"rank-{rank}.log")
            file.setFormatter(SafeFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            logger.addHandler(file)
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())
