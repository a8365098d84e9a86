"""Runs functions on several real processes, and commands as users type them."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from tools.ranks import CommandResult, RankOverride, RunningCommand, context, run_command, run_ranks, running_command
from trainer.distributed import get_free_port

__all__ = [
    "CommandResult",
    "RankOverride",
    "RunningCommand",
    "captured_messages",
    "context",
    "deepspeed_command",
    "get_free_port",
    "run_command",
    "run_ranks",
    "running_command",
]


def deepspeed_command(*arguments: str, ranks: int = 2) -> list[str]:
    """Return the command line that starts launch/train.py through the `deepspeed` launcher, on a free port."""
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    port = str(get_free_port())
    return [launcher, "--num_gpus", str(ranks), "--master_port", port, "launch/train.py", *arguments]


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
