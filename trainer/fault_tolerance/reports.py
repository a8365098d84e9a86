"""Reports of ranks about themselves in the store, and the view of one rank on the others."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace

from trainer.distributed import Launch, Phase, PhaseMark, PrefixStore, Store, open_second_connection
from trainer.fault_tolerance.inspection import process_state
from trainer.fault_tolerance.processes import process_namespace

log = logging.getLogger(__name__)

STALE_ROUNDS = 3
"""Exchanges over which the report of a rank may stay the same; after that the rank counts as not responding."""


@dataclass(frozen=True)
class Report:
    """State of a rank, as it reports itself."""

    rank: int
    host: str
    namespace: str
    pid: int
    phase_index: int = 0
    progress: int = 0
    phase: Phase = "start"
    step: int = 0
    waited: float = 0.0
    """Seconds without progress; 0 while they are less than the interval between two reports."""

    location: str = ""
    """Location of the main thread; empty while `waited` is 0."""

    in_collective: bool = False
    error: str = ""
    """Cause of the failure of this rank; empty without one."""

    @property
    def mark(self) -> PhaseMark:
        return PhaseMark(self.phase_index, self.progress, self.phase, self.step)

    def with_mark(self, mark: PhaseMark) -> Report:
        """Return the report of the same rank at another mark."""
        return replace(self, **mark._asdict())

    @property
    def name(self) -> str:
        return f"rank {self.rank} (host {self.host})"


def initial_report(launch: Launch) -> Report:
    """Return the report of this rank at the start."""
    return Report(launch.rank, socket.gethostname(), process_namespace(), os.getpid())


class PeerReports:
    """Reports of all ranks over several exchanges, as one rank sees them."""

    def __init__(self, local: Report, world_size: int) -> None:
        self._local, self._world_size = local, world_size
        self.rounds = 0
        """Exchanges since this rank began to read the reports."""

        self.rank_zero_report: Report | None = None
        """Report of rank 0 after all ranks had joined: the store does not respond once rank 0 hangs."""

        self._seen: dict[int, tuple[Report, int]] = {}

    def reset(self) -> None:
        self.rounds, self._seen = 0, {}

    def update(self, reports: Mapping[int, Report]) -> None:
        """Store the reports of an exchange."""
        seen = dict(self._seen)
        for rank, report in reports.items():
            if rank not in seen or seen[rank][0] != report:
                seen[rank] = report, self.rounds
        self._seen = seen  # in one assignment: another thread reads it
        self.rounds += 1

    def reports(self) -> dict[int, Report]:
        rank_zero_report = {} if self.rank_zero_report is None else {0: self.rank_zero_report}
        return rank_zero_report | {rank: report for rank, (report, _) in self._seen.items()}

    def unresponsive_rank_zero(self) -> dict[int, str]:
        """Return rank 0, whose store does not respond, with the reason if known."""
        condition = "" if self.rank_zero_report is None else self._condition(self.rank_zero_report)
        return {0: condition or "does not respond"}

    def _condition(self, report: Report) -> str:
        state = process_state(report.pid) if report.namespace == self._local.namespace else "running"
        return {"dead": f"its process {report.pid} has died", "stopped": f"its process {report.pid} is stopped"}.get(
            state, ""
        )

    def lost_ranks(self) -> dict[int, str]:
        """Return the ranks that cannot continue, with the reason: dead, stopped, failed, or not responding."""
        reasons = {}
        for rank, (report, since) in sorted(self._seen.items()):
            if rank == self._local.rank or report.phase == "finished":
                continue
            if report.error:
                reasons[rank] = f"failed: {report.error}"
            elif condition := self._condition(report):
                reasons[rank] = condition
            elif self.rounds - since >= STALE_ROUNDS:
                reasons[rank] = "does not respond"
        return reasons

    def ranks_behind(self, phase_index: int) -> list[int]:
        """Return the ranks that have not entered the phase at `phase_index`, or have not started."""
        if not self.rounds:
            return []
        reports = self.reports()
        return [r for r in range(self._world_size) if r not in reports or reports[r].phase_index < phase_index]

    def describe(self, ranks: Iterable[int], lost_ranks: Mapping[int, str] = {}, limit: int = 8) -> str:
        """Describe ranks by host, last phase and condition."""
        reports, ranks = self.reports(), list(ranks)
        descriptions = []
        for rank in ranks[:limit]:
            report = reports.get(rank)
            if report is None:
                descriptions.append(f"rank {rank} ({lost_ranks.get(rank, 'not started')})")
                continue
            parts = [f"host {report.host}"]
            if report is not self.rank_zero_report:
                parts.append(f"last in {report.mark.name}")
            if rank in lost_ranks:
                parts.append(lost_ranks[rank])
            elif report.location:
                parts.append(report.location)
            descriptions.append(f"rank {rank} ({', '.join(parts)})")
        return ", ".join(descriptions) + (f" and {len(ranks) - limit} more" if len(ranks) > limit else "")


class Reporter:
    """Thread that posts this rank's report when it changes, and on request reads the reports of all ranks.

    It has its own connection to the store and blocks while rank 0 does not respond, so no other thread may wait for it.
    """

    def __init__(self, launch: Launch, store: Store, interval: float, make_report: Callable[[], Report]) -> None:
        self._launch, self._interval, self._make_report = launch, interval, make_report
        self._store: Store = PrefixStore("watchdog", open_second_connection(store))
        self.peers = PeerReports(make_report(), launch.world_size)
        self.reads_peers = False
        """Set to True to read the reports of all ranks."""

        self._posted: Report | None = None
        self._posting_ranks: set[int] = set()
        self._request_started: float | None = None
        self._is_disconnected = False
        self._is_closed = False
        self._wake_event = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, seconds: float) -> None:
        """Post a last report, and wait up to `seconds` for it."""
        self._is_closed = True
        self._wake_event.set()
        self._thread.join(seconds)

    def wake(self) -> None:
        """Exchange reports at once."""
        self._wake_event.set()

    def seconds_unanswered(self) -> float:
        """Return how long the store has not responded; infinity once the connection is closed."""
        if self._is_disconnected:
            return float("inf")
        asked = self._request_started
        return 0.0 if asked is None else time.monotonic() - asked

    def _run(self) -> None:
        while True:
            closed = self._is_closed
            self._request_started = time.monotonic()
            try:
                self._exchange()
            except RuntimeError:  # torch's DistNetworkError and DistStoreError: rank 0 has gone
                self._is_disconnected = True
                return
            self._request_started = None
            if closed:
                return
            self._wake_event.wait(self._interval)
            self._wake_event.clear()

    def _exchange(self) -> None:
        report = self._make_report()
        if report != self._posted:
            self._store.set(str(report.rank), json.dumps(asdict(report)))
            self._posted = report
            if report.waited:
                self._store.check([str(report.rank)])  # unlike `set`, `check` waits for a response
        # Before all ranks have joined, rank 0 may not have posted, and `get` would wait.
        has_joined = report.phase not in ("start", "data", "join")
        if self.peers.rank_zero_report is None and (has_joined or self._store.check(["0"])):
            self.peers.rank_zero_report = Report(**json.loads(self._store.get("0")))
        if not self.reads_peers:
            if self.peers.rounds:
                self.peers.reset()
            return
        for rank in range(self._launch.world_size):
            if rank not in self._posting_ranks and self._store.check([str(rank)]):
                self._posting_ranks.add(rank)
        ranks = sorted(self._posting_ranks)
        texts = self._store.multi_get([str(rank) for rank in ranks])
        self.peers.update({rank: Report(**json.loads(text)) for rank, text in zip(ranks, texts, strict=True)})
