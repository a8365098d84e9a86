"""The guard of a run: lock, stop requests and watchdog together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.distributed import Launch, Phases, Store
from trainer.fault_tolerance.run_lock import RunLock
from trainer.fault_tolerance.stop_requests import StopRequests
from trainer.fault_tolerance.watchdog import Watchdog
from trainer.run_directory import RunDirectory


@dataclass(frozen=True)
class GuardedRun:
    """A run in progress, with its protection."""

    directory: RunDirectory
    lock: RunLock
    requests: StopRequests
    phases: Phases


@contextlib.contextmanager
def guarded_run(
    launch: Launch,
    store: Store,
    requests: StopRequests,
    *,
    directory: RunDirectory,
    lock: RunLock,
    timeout_seconds: float,
) -> Iterator[GuardedRun]:
    """Record stop requests and failures, and detect hanging ranks. Collective: all ranks must enter the context.

    Args:
        launch: This process, as the launcher describes it.
        store: Store of all ranks.
        requests: Stop requests of this rank, installed already.
        directory: The run directory.
        lock: Lock of `directory`; released at the end, or by the kernel after an error.
        timeout_seconds: `run.collective_timeout_seconds`.

    Raises:
        RankLost: another rank died or did not arrive.
    """
    requests.begin_run(directory, lock)
    watchdog = Watchdog(launch, store, timeout_seconds, directory)
    with watchdog.explain_failures():
        yield GuardedRun(directory, lock, requests, watchdog.phases)
    lock.release()
