"""Which exceptions come from another rank's failure, as far as torch and gloo tell."""

from __future__ import annotations

import re

import torch.distributed as dist

from trainer.errors import first_line

_TIMEOUT = re.compile(r"tim(ed?|ing) ?out", re.IGNORECASE)
_CONNECTION = re.compile(r"gloo|connection (was )?(closed|reset|refused)|broken pipe|ncclRemoteError", re.IGNORECASE)


def is_collective_failure(error: Exception) -> bool:
    """Whether an exception comes from a collective or the store because another rank is gone or late."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (is_timeout(text) or is_broken_connection(text))


def is_timeout(text: str) -> bool:
    return bool(_TIMEOUT.search(text))


def is_broken_connection(text: str) -> bool:
    return bool(_CONNECTION.search(text))


def cause_of(error: Exception) -> str:
    """The first sentence of what torch or gloo say, without the line of their source."""
    line = first_line(error)
    return re.sub(r"^\[[^\]]*\.(cc|cpp|h):\d+\] *", "", line).partition(". ")[0]
