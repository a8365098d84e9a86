"""Waiting for what other ranks have to post in the store, with a line about who is missing."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from datetime import timedelta

from torch.distributed import Store

from trainer.units import format_duration

log = logging.getLogger(__name__)

LOG_INTERVAL_SECONDS = 30.0
"""Between two lines about the same wait, and before the first."""

_POLL_SECONDS = 0.01, 0.5
"""Between two looks, at first and after a while. A store's own `wait` writes a warning of torch's at each timeout."""

_MAX_NAMES = 8


def wait_for_keys(store: Store, keys: Mapping[str, str], purpose: str, timeout: timedelta) -> list[str]:
    """Wait until all keys are in the store, with a log line every 30 s.

    Args:
        keys: from a key to who sets it. purpose: completes "waited 0:00:30 for rank 3 to ...".

    Returns:
        Who has not set their key within `timeout`; usually nobody.
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


def publish_value(store: Store, world: int, key: str, value: str, purpose: str, timeout: timedelta) -> None:
    """Post a value for all other ranks and wait until they have read it: rank 0 may end then, and the store with it.

    Call on rank 0, and `receive_value` on the others.

    Args:
        purpose: what the others have to do, as in `wait_for_keys`.
        timeout: at most so long; then they are not waited for.
    """
    store.set(key, value)
    wait_for_keys(store, {f"{key}/read/{rank}": f"rank {rank}" for rank in range(1, world)}, purpose, timeout)


def receive_value(store: Store, rank: int, key: str, purpose: str, timeout: timedelta) -> str | None:
    """What rank 0 hands out; None if it has not within `timeout`.

    Args:
        purpose: what rank 0 has to do, as in `wait_for_keys`.
    """
    if wait_for_keys(store, {key: "rank 0"}, purpose, timeout):
        return None
    value = store.get(key).decode()
    store.set(f"{key}/read/{rank}", "")
    return value


def join_names(names: list[str]) -> str:
    """Some of the names, and how many more there are."""
    suffix = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + suffix
