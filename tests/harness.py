"""Runs functions on several real processes, and commands as users type them, a few seconds a time."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from tools.ranks import Finished, Started, Variant, context, run_command, run_ranks, started_command
from trainer.distributed import get_free_port

__all__ = [
    "Finished", "Started", "Variant", "context", "get_free_port", "messages_of", "run_command", "run_ranks",
    "started_command",
]  # fmt: skip


@contextlib.contextmanager
def messages_of(name: str) -> Iterator[list[str]]:
    """Within, the messages of one logger, whatever other tests have done to its parents."""
    found: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger(name)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
