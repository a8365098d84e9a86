"""Runs work on ranks, so that an error of one rank is raised on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from trainer.errors import ConfigError, TesseraError

T = TypeVar("T")


def agree(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Return this rank's result of `work`; raise an error of any rank on all ranks.

    Collective: all ranks of `group` must call it, so that no rank waits for a rank that has failed. Without process
        group
    only this rank's work is done.

    Args:
        work: May raise only a `TesseraError`.
        group: The ranks; by default all of torch's default group.

    Raises:
        ConfigError: with the problems of all ranks.
        TesseraError: the error of the first failed rank, if it is another type.
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
    errors = [each for each in gathered if each is not None]
    if errors and isinstance(errors[0], ConfigError):
        problems = (problem for each in errors if isinstance(each, ConfigError) for problem in each.problems)
        raise ConfigError(dict.fromkeys(problems))
    if errors:
        raise errors[0]
    return result  # type: ignore[return-value]


def run_on_rank_zero(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Return the result of `work` on rank 0, on all ranks. Collective: all ranks of `group` must call it.

    Args:
        work: May raise only a `TesseraError`.
        group: The ranks, among them rank 0; by default all of torch's default group.

    Raises:
        TesseraError: the error of rank 0, on all ranks.
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
