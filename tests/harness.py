"""Runs functions on several real processes, and commands as users type them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from tools.ranks import CommandResult, RankOverride, RunningCommand, context, run_command, run_ranks, running_command
from trainer.distributed import get_free_port

__all__ = [
    "CommandResult",
    "RankOverride",
    "RunningCommand",
    "captured_messages",
    "context",
    "get_free_port",
    "run_command",
    "run_ranks",
    "running_command",
]


@contextlib.contextmanager
def captured_messages(name: str) -> Iterator[list[str]]:
    """Collect the messages of one logger, whatever other tests have done to its parents."""
    messages: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger(name)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
