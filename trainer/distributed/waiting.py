"""Waiting for values that other ranks post in the store, with a log line about the missing ranks."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from datetime import timedelta

from torch.distributed import Store

from trainer.units import format_duration

log = logging.getLogger(__name__)

LOG_INTERVAL_SECONDS = 30.0
"""Interval between two log lines about the same wait, and time before the first."""

_POLL_SECONDS = 0.01, 0.5
"""First and longest interval between two checks. The store's own `wait` logs a warning at each timeout."""

_MAX_NAMES = 8


def wait_for_keys(store: Store, keys: Mapping[str, str], purpose: str, timeout: timedelta) -> list[str]:
    """Wait until all keys are in the store; log the missing ones every 30 s.

    Args:
        store: Store of all ranks.
        keys: Owner of each key, such as "rank 3".
        purpose: Completes the log line "waited 0:00:30 for rank 3 to ...".
        timeout: Longest wait.

    Returns:
        Owners whose key is still missing after `timeout`; usually none.
    """
    missing, start = dict(keys), time.monotonic()
    logged_at, poll_seconds = start, _POLL_SECONDS[0]
    while missing := {key: owner for key, owner in missing.items() if not store.check([key])}:
        now = time.monotonic()
        remaining = start + timeout.total_seconds() - now
        if remaining <= 0:
            break
        if now - logged_at >= LOG_INTERVAL_SECONDS:
            logged_at = now
            log.info(
                "waited %s for %s to %s", format_duration(now - start), join_names(list(missing.values())), purpose
            )
        time.sleep(min(remaining, poll_seconds, LOG_INTERVAL_SECONDS))
        poll_seconds = min(2 * poll_seconds, _POLL_SECONDS[1])
    return list(missing.values())


def publish_value(store: Store, world_size: int, key: str, value: str, *, purpose: str, timeout: timedelta) -> None:
    """Post a value for all other ranks, which call `receive_value`, and wait until they have read it. Rank 0 only.

    The wait matters because rank 0 hosts the store, which ends with it.

    Args:
        store: Store of all ranks.
        world_size: Number of ranks.
        key: Key of the value.
        value: The value.
        purpose: Purpose of the other ranks, as in `wait_for_keys`.
        timeout: Longest wait; late ranks are ignored.
    """
    store.set(key, value)
    wait_for_keys(store, {f"{key}/read/{rank}": f"rank {rank}" for rank in range(1, world_size)}, purpose, timeout)


def receive_value(store: Store, rank: int, key: str, *, purpose: str, timeout: timedelta) -> str | None:
    """Return the value that rank 0 publishes; None if it has not done so within `timeout`.

    Args:
        store: Store of all ranks.
        rank: This rank.
        key: Key of the value.
        purpose: Purpose of rank 0, as in `wait_for_keys`.
        timeout: Longest wait.
    """
    if wait_for_keys(store, {key: "rank 0"}, purpose, timeout):
        return None
    value = store.get(key).decode()
    store.set(f"{key}/read/{rank}", "")
    return value


def join_names(names: list[str]) -> str:
    """Join the first names, and count the others."""
    suffix = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + suffix
