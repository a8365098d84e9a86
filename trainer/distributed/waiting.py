"""Waiting for what other ranks have to post in the store, with a line about who is missing."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from datetime import timedelta

from torch.distributed import Store

from trainer.units import format_duration

log = logging.getLogger(__name__)

LINE_SECONDS = 30.0
"""Between two lines about the same wait, and before the first."""

_POLL_SECONDS = 0.01, 0.5
"""Between two looks, at first and after a while. A store's own `wait` writes a warning of torch's at each timeout."""

_NAMED = 8


def wait_for(store: Store, keys: Mapping[str, str], purpose: str, patience: timedelta) -> list[str]:
    """Wait until all keys are in the store, with a log line every 30 s.

    Args:
        keys: from a key to who sets it. purpose: completes "waited 0:00:30 for rank 3 to ...".

    Returns:
        Who has not set their key within `patience`; usually nobody.
    """
    missing, start = dict(keys), time.monotonic()
    said, pause = start, _POLL_SECONDS[0]
    while missing := {key: who for key, who in missing.items() if not store.check([key])}:
        now = time.monotonic()
        left = start + patience.total_seconds() - now
        if left <= 0:
            break
        if now - said >= LINE_SECONDS:
            said = now
            log.info("waited %s for %s to %s", format_duration(now - start), named(list(missing.values())), purpose)
        time.sleep(min(left, pause, LINE_SECONDS))
        pause = min(2 * pause, _POLL_SECONDS[1])
    return list(missing.values())


def hand_out(store: Store, world: int, key: str, value: str, purpose: str, patience: timedelta) -> None:
    """Post a value for all other ranks and wait until they have read it: rank 0 may end then, and the store with it.

    Call on rank 0, and `receive` on the others.

    Args:
        purpose: what the others have to do, as in `wait_for`. patience: at most so long; then they are not waited for.
    """
    store.set(key, value)
    wait_for(store, {f"{key}/read/{rank}": f"rank {rank}" for rank in range(1, world)}, purpose, patience)


def receive(store: Store, rank: int, key: str, purpose: str, patience: timedelta) -> str | None:
    """What rank 0 hands out; None if it has not within `patience`.

    Args:
        purpose: what rank 0 has to do, as in `wait_for`.
    """
    if wait_for(store, {key: "rank 0"}, purpose, patience):
        return None
    value = store.get(key).decode()
    store.set(f"{key}/read/{rank}", "")
    return value


def named(names: list[str]) -> str:
    """Some of the names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
