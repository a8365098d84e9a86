"""What ranks decide together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from trainer.errors import ConfigError, TesseraError

T = TypeVar("T")


def agree(work: Callable[[], T], group: Any = None) -> T:
    """This rank's result of `work`, which every rank of the group must call. An error on one rank is raised on all, so
    that no rank waits for one that has given up. Without a process group, just the result.

    Args:
        group: None stands for all ranks.

    Raises:
        ConfigError: with the problems of all ranks that have some.
        TesseraError: the first rank's, if it is another one.
    """
    if not dist.is_initialized():
        return work()
    result: T | None = None
    error: TesseraError | None = None
    try:
        result = work()
    except TesseraError as raised:
        error = raised
    gathered: list[TesseraError | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, error, group=group)
    errors = [found for found in gathered if found is not None]
    if errors and isinstance(errors[0], ConfigError):
        problems = (problem for found in errors if isinstance(found, ConfigError) for problem in found.problems)
        raise ConfigError(dict.fromkeys(problems))
    if errors:
        raise errors[0]
    return result  # type: ignore[return-value]


def run_on_rank_zero(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Return the result of `work` on rank 0, on all ranks. Collective: all ranks of the group must call it.

    Raises:
        TesseraError: rank 0's, on all ranks.
    """
    outcome: list[tuple[T | None, TesseraError | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            outcome = [(work(), None)]
        except TesseraError as raised:
            outcome = [(None, raised)]
    dist.broadcast_object_list(outcome, src=0, group=group)
    result, error = outcome[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
