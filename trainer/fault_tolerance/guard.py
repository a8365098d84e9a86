"""Everything that guards a run which has its directory: its lock, stop requests, the watchdog."""

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
    """A run that this rank takes part in, and what watches over it."""

    directory: RunDirectory
    lock: RunLock
    requests: StopRequests
    phases: Phases


@contextlib.contextmanager
def guarded_run(
    launch: Launch, store: Store, requests: StopRequests, directory: RunDirectory, lock: RunLock, timeout_seconds: float
) -> Iterator[GuardedRun]:
    """Within, stop requests and failures are recorded, and a rank that hangs is noticed. All ranks must enter it.

    Args:
        requests: installed already. lock: of `directory`; released at the end, after an error by the process's end.
        timeout_seconds: `run.collective_timeout_seconds`.

    Raises:
        RankLost: another rank has died, or does not arrive.
    """
    requests.begin_run(directory, lock)
    watchdog = Watchdog(launch, store, timeout_seconds, directory)
    with watchdog.explain_failures():
        yield GuardedRun(directory, lock, requests, watchdog.phases)
    lock.release()
