"""Diagnosis of a wait: which ranks are missing, why, and which rank reports it."""

from __future__ import annotations

import time
from pathlib import Path

from trainer.distributed import Launch, PhaseMark
from trainer.fault_tolerance.failures import is_broken_connection
from trainer.fault_tolerance.reports import PeerReports, Reporter


class Diagnosis:
    """Information about the ranks that a rank waits for, from their reports in the store."""

    def __init__(self, launch: Launch, reporter: Reporter, interval: float) -> None:
        """Read the reports that `reporter` exchanges every `interval` seconds."""
        self._launch, self._reporter, self._interval = launch, reporter, interval

    @property
    def peers(self) -> PeerReports:
        """Reports of all ranks."""
        return self._reporter.peers

    def read_peers(self, is_wanted: bool) -> None:
        """Start or stop reading the reports of all ranks."""
        self._reporter.reads_peers = is_wanted

    def is_store_silent(self) -> bool:
        """Return True if rank 0, which hosts the store, does not respond."""
        return self._reporter.seconds_unanswered() > max(2 * self._interval, 0.5)

    def is_logging_rank(self) -> bool:
        """Return True on rank 0, and on rank 1 if rank 0 does not respond."""
        return self._launch.rank == 0 or (self._launch.rank == 1 and self.is_store_silent())

    def missing_ranks(self, mark: PhaseMark) -> tuple[dict[int, str], list[int]]:
        """Return the ranks that cannot continue, with the reason, and those that have not entered the phase."""
        if self._launch.rank != 0 and self.is_store_silent():
            return self.peers.unresponsive_rank_zero(), []
        lost = self.peers.lost_ranks()
        return lost, [rank for rank in self.peers.ranks_behind(mark.phase_index) if rank not in lost]

    def lost_rank(self, mark: PhaseMark) -> int:
        """Return the first rank that cannot continue; this rank if there is none."""
        return next(iter(self.missing_ranks(mark)[0]), self._launch.rank)

    def describe(self, mark: PhaseMark) -> str:
        """Describe the ranks that this rank waits for in a phase."""
        lost, missing = self.missing_ranks(mark)
        if lost or missing:
            return f"not arrived: {self.peers.describe([*lost, *missing], lost)}"
        working = [r for r, report in self.peers.reports().items() if report.waited and not report.in_collective]
        if working:
            return f"all ranks have entered it; not in a collective: {self.peers.describe(working)}"
        return "all ranks have entered it"

    def describe_timeout(self, mark: PhaseMark, timeout: float, *, stacks: Path, recording: Path) -> str:
        """Describe a timeout, and name the files with the stacks and the latest collectives of this rank."""
        recorded = f", its collectives in {recording}" if recording.exists() else ""
        return (
            f"{mark.name}: a collective did not complete within {timeout:g} s (run.collective_timeout_seconds); "
            f"{self.describe(mark)}. The stacks of this rank are in {stacks}{recorded}"
        )

    def reports_first(self, mark: PhaseMark) -> bool:
        """Return True on the lowest rank that can still report."""
        lost, _ = self.missing_ranks(mark)
        return self._launch.rank == min(rank for rank in range(self._launch.world_size) if rank not in lost)

    def wait_for_dead_ranks(self, poll_seconds: float) -> dict[int, str]:
        """Wait until the store shows which ranks are dead, or does not respond; return them with the reason.

        Ranks that failed only because they lost the connection to another rank are not among them.
        """
        deadline = time.monotonic() + 5 * self._interval
        while not (dead := self._dead_ranks()) and not self.is_store_silent() and time.monotonic() < deadline:
            time.sleep(poll_seconds)
        return dead

    def _dead_ranks(self) -> dict[int, str]:
        return {r: why for r, why in self.peers.lost_ranks().items() if not is_broken_connection(why)}
