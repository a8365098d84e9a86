"""Runs work on ranks, so that an error of one rank is raised on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from trainer.errors import ConfigError, TesseraError

T = TypeVar("T")


Translation = Callable[[Exception], Exception]
"""Returns the error to raise in place of one that work has raised, which may be the same."""


def _unchanged(error: Exception) -> Exception:
    return error


def agree(work: Callable[[], T], group: dist.ProcessGroup | None = None, *, translate: Translation = _unchanged) -> T:
    """Return this rank's result of `work`; raise an error of any rank on all ranks.

    Collective: all ranks of `group` must call it, so that no rank waits for a rank that has failed. Without process
        group
    only this rank's work is done.

    Args:
        work: May raise only what `translate` turns into a `TesseraError`.
        group: The ranks; by default all of torch's default group.
        translate: Of the error of this rank's work.

    Raises:
        ConfigError: with the problems of all ranks.
        TesseraError: the error of the first failed rank, if it is another type.
    """
    result, error = _attempt(work, translate)
    gathered = [error]
    if dist.is_initialized():
        gathered = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, error, group=group)
    errors = [each for each in gathered if each is not None]
    if errors and isinstance(errors[0], ConfigError):
        problems = (problem for each in errors if isinstance(each, ConfigError) for problem in each.problems)
        raise ConfigError(dict.fromkeys(problems))
    if errors:
        raise errors[0]
    return result  # type: ignore[return-value]


def run_on_rank_zero(
    work: Callable[[], T], group: dist.ProcessGroup | None = None, *, translate: Translation = _unchanged
) -> T:
    """Return the result of `work` on rank 0, on all ranks. Collective: all ranks of `group` must call it.

    Args:
        work: May raise only what `translate` turns into a `TesseraError`.
        group: The ranks, among them rank 0; by default all of torch's default group.
        translate: Of the error of the work.

    Raises:
        TesseraError: the error of rank 0, on all ranks.
    """
    outcome: list[tuple[T | None, TesseraError | None]] = [(None, None)]
    if dist.get_rank() == 0:
        outcome = [_attempt(work, translate)]
    dist.broadcast_object_list(outcome, src=0, group=group)
    result, error = outcome[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def _attempt(work: Callable[[], T], translate: Translation) -> tuple[T | None, TesseraError | None]:
    """Return the result of `work`, or its error; raise one that `translate` does not turn into a `TesseraError`."""
    try:
        return work(), None
    except Exception as raised:
        error = translate(raised)
        if not isinstance(error, TesseraError):
            raise
        return None, error
