"""Recognition of exceptions that another rank's failure causes, by the error messages of torch and gloo."""

from __future__ import annotations

import re

import torch.distributed as dist

from trainer.errors import first_line

_TIMEOUT = re.compile(r"tim(ed?|ing) ?out", re.IGNORECASE)
_CONNECTION = re.compile(r"gloo|connection (was )?(closed|reset|refused)|broken pipe|ncclRemoteError", re.IGNORECASE)


def is_collective_failure(error: Exception) -> bool:
    """Return True if an exception comes from a collective or the store because another rank died or is late."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (is_timeout(text) or is_broken_connection(text))


def is_timeout(text: str) -> bool:
    """Return True if a message reports that a collective timed out."""
    return bool(_TIMEOUT.search(text))


def is_broken_connection(text: str) -> bool:
    """Return True if a message reports a broken connection to another rank."""
    return bool(_CONNECTION.search(text))


def cause_of(error: Exception) -> str:
    """Extract the first sentence of a message of torch or gloo, without the location in their source code."""
    line = first_line(error)
    return re.sub(r"^\[[^\]]*\.(cc|cpp|h):\d+\] *", "", line).partition(". ")[0]
