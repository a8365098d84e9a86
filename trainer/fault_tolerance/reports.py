"""What ranks report about themselves in the store, and what one rank sees of the others."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace

from trainer.distributed import Launch, Mark, Phase, PrefixStore, Store, second_connection
from trainer.fault_tolerance.inspection import process_state
from trainer.fault_tolerance.processes import process_namespace

log = logging.getLogger(__name__)

STALE_ROUNDS = 3
"""A rank whose report has stayed the same over so many exchanges does not respond."""


@dataclass(frozen=True)
class Report:
    """One rank's own view of itself."""

    rank: int
    host: str
    namespace: str
    pid: int
    position: int = 0
    progress: int = 0
    phase: Phase = "start"
    step: int = 0
    waited: float = 0.0
    """Seconds without progress, once these are more than the interval between two reports."""

    location: str = ""
    """Where the main thread is, once it has waited."""

    in_collective: bool = False
    error: str = ""
    """Why this rank has given up; empty while it has not."""

    @property
    def mark(self) -> Mark:
        return Mark(self.position, self.progress, self.phase, self.step)

    def at(self, mark: Mark) -> Report:
        """The same rank at a mark."""
        return replace(self, **mark._asdict())

    @property
    def name(self) -> str:
        return f"rank {self.rank} (host {self.host})"


def own_report(launch: Launch) -> Report:
    return Report(launch.rank, socket.gethostname(), process_namespace(), os.getpid())


class Peers:
    """The other ranks, as a rank sees them over several exchanges."""

    def __init__(self, own: Report, world: int) -> None:
        self._own, self._world = own, world
        self.rounds = 0
        """Exchanges since this rank has begun to look."""

        self.first: Report | None = None
        """Of rank 0, as it was when all had joined: the store cannot be asked for it once rank 0 hangs."""

        self._seen: dict[int, tuple[Report, int]] = {}

    def reset(self) -> None:
        self.rounds, self._seen = 0, {}

    def update(self, reports: Mapping[int, Report]) -> None:
        """Take over what an exchange has found."""
        seen = dict(self._seen)
        for rank, report in reports.items():
            if rank not in seen or seen[rank][0] != report:
                seen[rank] = report, self.rounds
        self._seen = seen  # at once: another thread reads it
        self.rounds += 1

    def reports(self) -> dict[int, Report]:
        first = {} if self.first is None else {0: self.first}
        return first | {rank: report for rank, (report, _) in self._seen.items()}

    def silent_first(self) -> dict[int, str]:
        """Rank 0, whose store does not answer, with the reason as far as it is known."""
        condition = "" if self.first is None else self._condition(self.first)
        return {0: condition or "does not respond"}

    def _condition(self, report: Report) -> str:
        state = process_state(report.pid) if report.namespace == self._own.namespace else "running"
        return {"dead": f"its process {report.pid} has died", "stopped": f"its process {report.pid} is stopped"}.get(
            state, ""
        )

    def lost(self) -> dict[int, str]:
        """Ranks that cannot go on, with the reason: dead, stopped, given up, or silent for several exchanges."""
        found = {}
        for rank, (report, since) in sorted(self._seen.items()):
            if rank == self._own.rank or report.phase == "finished":
                continue
            if report.error:
                found[rank] = f"failed: {report.error}"
            elif condition := self._condition(report):
                found[rank] = condition
            elif self.rounds - since >= STALE_ROUNDS:
                found[rank] = "does not respond"
        return found

    def behind(self, position: int) -> list[int]:
        """Ranks that have not entered the phase at `position`, or have not even started."""
        if not self.rounds:
            return []
        reports = self.reports()
        return [r for r in range(self._world) if r not in reports or reports[r].position < position]

    def described(self, ranks: Iterable[int], lost: Mapping[int, str] = {}, limit: int = 8) -> str:
        """The ranks with host, last phase and condition."""
        reports, ranks = self.reports(), list(ranks)
        shown = []
        for rank in ranks[:limit]:
            report = reports.get(rank)
            if report is None:
                shown.append(f"rank {rank} ({lost.get(rank, 'not started')})")
                continue
            parts = [f"host {report.host}"]
            if report is not self.first:
                parts.append(f"last in {report.mark.name}")
            if rank in lost:
                parts.append(lost[rank])
            elif report.location:
                parts.append(report.location)
            shown.append(f"rank {rank} ({', '.join(parts)})")
        return ", ".join(shown) + (f" and {len(ranks) - limit} more" if len(ranks) > limit else "")


class Reporter:
    """A thread that posts this rank's report when it has changed, and reads the others' when asked to.

    It has its own connection to the store, and blocks for as long as rank 0 does not answer: nobody may wait for it.
    """

    def __init__(self, launch: Launch, store: Store, interval: float, own: Callable[[], Report]) -> None:
        self._launch, self._interval, self._own = launch, interval, own
        self._store: Store = PrefixStore("watchdog", second_connection(store))
        self.peers = Peers(own(), launch.world)
        self.looks = False
        """Whether to read the others' reports."""

        self._posted: Report | None = None
        self._known: set[int] = set()
        self._asked_at: float | None = None
        self._broken = False
        self._closed = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, seconds: float) -> None:
        """Post a last time, and wait for that as long as given."""
        self._closed = True
        self._wake.set()
        self._thread.join(seconds)

    def wake(self) -> None:
        """Report at once."""
        self._wake.set()

    def unanswered_seconds(self) -> float:
        """For how long the store has not answered; infinite once the connection is closed."""
        if self._broken:
            return float("inf")
        asked = self._asked_at
        return 0.0 if asked is None else time.monotonic() - asked

    def _run(self) -> None:
        while True:
            closed = self._closed
            self._asked_at = time.monotonic()
            try:
                self._exchange()
            except RuntimeError:  # torch's DistNetworkError and DistStoreError: rank 0 has gone
                self._broken = True
                return
            self._asked_at = None
            if closed:
                return
            self._wake.wait(self._interval)
            self._wake.clear()

    def _exchange(self) -> None:
        report = self._own()
        if report != self._posted:
            self._store.set(str(report.rank), json.dumps(asdict(report)))
            self._posted = report
            if report.waited:
                self._store.check([str(report.rank)])  # unlike `set`, this waits for an answer
        # Before all have joined rank 0 may not have posted: `get` would wait for it.
        has_joined = report.phase not in ("start", "data", "join")
        if self.peers.first is None and (has_joined or self._store.check(["0"])):
            self.peers.first = Report(**json.loads(self._store.get("0")))
        if not self.looks:
            if self.peers.rounds:
                self.peers.reset()
            return
        for rank in range(self._launch.world):
            if rank not in self._known and self._store.check([str(rank)]):
                self._known.add(rank)
        known = sorted(self._known)
        texts = self._store.multi_get([str(rank) for rank in known])
        self.peers.update({rank: Report(**json.loads(text)) for rank, text in zip(known, texts, strict=True)})
