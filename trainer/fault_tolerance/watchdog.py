"""Watches over the phases of all ranks: says for whom the others wait, and ends a rank that waits for too long.

Three threads of a rank have a part in it. The main thread marks its phase (`Phases`, plain attributes). The reporter
posts the mark to the store and reads the others'. The watchdog measures how long the main thread has been without
progress, and never touches the store: it must work when rank 0, which hosts it, is the rank that hangs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from trainer.distributed import Launch, PhaseMark, Phases, Store
from trainer.errors import Preempted, RankLost, TesseraError
from trainer.fault_tolerance.failures import cause_of, is_broken_connection, is_collective_failure, is_timeout
from trainer.fault_tolerance.inspection import (
    dump_stacks,
    enable_flight_recorder,
    is_debugged,
    main_thread_location,
    write_flight_recorder,
)
from trainer.fault_tolerance.reports import Report, Reporter, initial_report
from trainer.run_directory import RunDirectory

log = logging.getLogger(__name__)

REPORT_SECONDS = 5.0
"""Least time between two reports of a rank, unless a twentieth of the limit is shorter."""

PEER_CHECK_SECONDS = 10.0
"""Time without progress after which rank 0 looks for ranks that cannot go on, unless a twentieth of the limit is
shorter: so a stopped rank is reported within 30 s, whatever the limit."""

WAIT_LINE_SECONDS = 30.0
"""Time between two lines about the same phase, and before the first one in phases without a limit."""

RAISE_SECONDS = 3.0
"""After the limit a collective has so long to raise by itself; then the watchdog ends the process."""

MESSAGE_SECONDS = 1.0
"""Other ranks leave so much later than the one that reports: a launcher ends all ranks as soon as one leaves."""

DEATH_DELAY_SECONDS = 10.0
"""After the death of a rank the others leave so much later: its own status should be the run's."""

_ENDED_BY_WATCHDOG = ("step", "evaluate", "save")
"""In `final` rank 0 works alone for a time, and all that the others wait for are collectives that raise."""


class Watchdog:
    """Reports what this rank is doing, and ends it when it waits for longer than the limit.

    In a world of one rank there is nobody to wait for, and no thread is started.
    """

    def __init__(self, launch: Launch, store: Store, timeout_seconds: float, directory: RunDirectory) -> None:
        """Args:
        timeout_seconds: `run.collective_timeout_seconds`. directory: stacks go to its logs, failures to its events.
        """
        self.phases = Phases(timeout_seconds)
        self._launch, self._directory, self._logs = launch, directory, directory.path / "logs"
        self._interval = min(REPORT_SECONDS, timeout_seconds / 20)
        self._check_after = min(PEER_CHECK_SECONDS, timeout_seconds / 20)
        self._tick = min(1.0, timeout_seconds / 50)
        self._initial_report = initial_report(launch)
        self._error = ""
        self._mark, self._seconds_waited = PhaseMark(), 0.0
        self._logged_at: dict[str, float] = {}
        """When each sort of line was last written in this phase, in seconds of waiting."""

        self._has_dumped = self._is_closed = False
        self._reporter: Reporter | None = None
        if launch.world_size > 1:
            enable_flight_recorder(self._logs)
            self._reporter = Reporter(launch, store, self._interval, self._report)
            self._reporter.start()
            threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def close(self) -> None:
        """End the threads; the store is told that this rank has finished."""
        self.phases.enter("finished")
        self._is_closed = True
        if self._reporter is not None:
            self._reporter.close(2.0)

    @contextlib.contextmanager
    def explain_failures(self) -> Iterator[None]:
        """Raise failures of collectives within as errors that name the rank that is missing. Rank 0 records every
        failure as an event.

        Raises:
            RankLost: in place of what torch raises when another rank has died, or does not arrive.
        """
        try:
            yield
        except Preempted:
            raise
        except Exception as error:
            if self._reporter is None or isinstance(error, TesseraError) or not is_collective_failure(error):
                self._post_failure(str(error) or repr(error))
                self._record(str(error) or repr(error), self._launch.rank)
                raise
            failure = self._explain(error)
            self._record(str(failure), next(iter(self._find_missing(self.phases.mark)[0]), self._launch.rank))
            raise failure from error
        self.close()

    def _record(self, cause: str, rank: int) -> None:
        """Append the event of a failure; rank 0 only.

        Args:
            rank: the one that has failed, as far as rank 0 knows.
        """
        if self._launch.rank != 0 or not self._directory.path.is_dir():
            return
        mark = self.phases.mark
        peers = {} if self._reporter is None else self._reporter.peers.reports()
        host = peers[rank].host if rank in peers else self._initial_report.host
        step = mark.step - 1 if mark.phase == "step" else mark.step
        self._directory.record("failure", step, rank=rank, host=host, phase=mark.name, cause=cause)

    # What the reporter posts ------------------------------------------------------------------------------------------

    def _report(self) -> Report:
        report = replace(self._initial_report.with_mark(self.phases.mark), error=self._error)
        if self._seconds_waited < self._interval:
            return report
        location, in_collective = main_thread_location()
        return replace(report, waited=round(self._seconds_waited, 1), location=location, in_collective=in_collective)

    def _post_failure(self, reason: str) -> None:
        self._error = (reason.splitlines() or [""])[0][:300]
        if self._reporter is not None:
            self._reporter.reads_peers = True
            self._reporter.wake()

    # The watch --------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        before = time.monotonic()
        while not self._is_closed:
            time.sleep(self._tick)
            now = time.monotonic()
            # A process that was suspended, or a host that slept, has not waited all that time.
            self._check_wait(min(now - before, 3 * self._tick))
            before = now

    def _check_wait(self, seconds: float) -> None:
        assert self._reporter is not None
        mark, limit = self.phases.mark, self.phases.timeout
        if mark != self._mark:
            self._mark, self._seconds_waited, self._logged_at, self._has_dumped = mark, 0.0, {}, False
            self._reporter.reads_peers = bool(self._error)
            return
        self._seconds_waited += seconds
        if self._error:
            self._reporter.reads_peers = True
        if self._error or self._seconds_waited < self._check_after:
            return
        # Every rank looks when its time is nearly up: its collective may raise, and it must know whom to name.
        self._reporter.reads_peers = self._is_logging_rank() or self._seconds_waited > limit - 5 * self._interval
        if self._is_logging_rank():
            self._log_waiting(mark, limit)
        if mark.phase in _ENDED_BY_WATCHDOG and self._seconds_waited >= limit:
            self._handle_timeout(mark, limit)

    def _is_logging_rank(self) -> bool:
        """Rank 0; where its store does not answer, rank 1 speaks in its place."""
        if self._launch.rank == 0:
            return True
        return self._launch.rank == 1 and self._is_store_silent()

    def _is_store_silent(self) -> bool:
        assert self._reporter is not None
        return self._reporter.seconds_unanswered() > max(2 * self._interval, 0.5)

    def _log_waiting(self, mark: PhaseMark, limit: float) -> None:
        """Say whom this rank waits for: at once for ranks that cannot go on, else after a tenth of the limit."""
        lost_ranks, missing = self._find_missing(mark)
        if lost_ranks and self._is_line_due("lost"):
            log.warning("%s has taken %.0f s; %s", mark.name, self._seconds_waited, self._describe(lost_ranks, missing))
        is_limited = mark.phase in _ENDED_BY_WATCHDOG or mark.phase == "final"
        slow_after = limit / 10 if is_limited else WAIT_LINE_SECONDS
        if (
            self._seconds_waited < slow_after
            or lost_ranks
            or not (missing or is_limited)
            or not self._is_line_due("slow")
        ):
            return
        log.warning("%s has taken %.0f s; %s", mark.name, self._seconds_waited, self._describe(lost_ranks, missing))

    def _is_line_due(self, category: str) -> bool:
        last = self._logged_at.get(category)
        if last is not None and self._seconds_waited - last < WAIT_LINE_SECONDS:
            return False
        self._logged_at[category] = self._seconds_waited
        return True

    def _find_missing(self, mark: PhaseMark) -> tuple[dict[int, str], list[int]]:
        """Ranks that cannot go on, and ranks that have not entered this phase."""
        assert self._reporter is not None
        if self._launch.rank != 0 and self._is_store_silent():
            return self._reporter.peers.unresponsive_rank_zero(), []
        lost_ranks = self._reporter.peers.lost_ranks()
        return lost_ranks, [
            rank for rank in self._reporter.peers.ranks_behind(mark.phase_index) if rank not in lost_ranks
        ]

    def _describe(self, lost_ranks: dict[int, str], missing: list[int]) -> str:
        assert self._reporter is not None
        peers = self._reporter.peers
        if lost_ranks or missing:
            return f"not arrived: {peers.describe([*lost_ranks, *missing], lost_ranks)}"
        working_ranks = [r for r, report in peers.reports().items() if report.waited and not report.in_collective]
        if working_ranks:
            return f"all ranks have entered it; not in a collective: {peers.describe(working_ranks)}"
        return "all ranks have entered it"

    # The end ----------------------------------------------------------------------------------------------------------

    def _handle_timeout(self, mark: PhaseMark, limit: float) -> None:
        """The limit has passed: write the stacks; end the process if its collective has not raised by then."""
        if is_debugged():
            if self._is_line_due("debugger"):
                log.warning("%s has taken %.0f s, in a debugger: not ended", mark.name, self._seconds_waited)
            return
        self._dump()
        patience = RAISE_SECONDS + (0 if self._reports_first(mark) else MESSAGE_SECONDS)
        if self._seconds_waited < limit + patience:
            return
        message = (
            f"error (rank {self._launch.rank} on {self._initial_report.host}): {self._timeout_message(mark, limit)}"
        )
        if self._error or self._is_closed:  # the main thread has raised meanwhile
            return
        self._record(self._timeout_message(mark, limit), next(iter(self._find_missing(mark)[0]), self._launch.rank))
        with contextlib.suppress(OSError), self._stacks.open("a") as file:
            print(message, file=file)
        print(message, file=sys.stderr, flush=True)
        os._exit(RankLost.exit_status)

    def _dump(self) -> None:
        if self._has_dumped:
            return
        self._has_dumped = True
        dump_stacks(self._stacks)
        write_flight_recorder(self._recording)

    @property
    def _stacks(self) -> Path:
        return self._logs / f"rank-{self._launch.rank}.log"

    @property
    def _recording(self) -> Path:
        return self._logs / f"flight-recorder-rank-{self._launch.rank}.json"

    def _timeout_message(self, mark: PhaseMark, limit: float) -> str:
        lost_ranks, missing = self._find_missing(mark)
        recorded = f", its collectives in {self._recording}" if self._recording.exists() else ""
        return (
            f"{mark.name}: a collective did not end within {limit:g} s (run.collective_timeout_seconds); "
            f"{self._describe(lost_ranks, missing)}. The stacks of this rank are in {self._stacks}{recorded}"
        )

    def _reports_first(self, mark: PhaseMark) -> bool:
        """Whether this is the lowest rank that can still speak."""
        lost_ranks, _ = self._find_missing(mark)
        return self._launch.rank == min(rank for rank in range(self._launch.world_size) if rank not in lost_ranks)

    def _explain(self, error: Exception) -> RankLost:
        """The error that names the ranks which are missing. Waits until the store tells who they are."""
        assert self._reporter is not None
        mark, limit = self.phases.mark, self.phases.timeout
        cause = cause_of(error)
        if is_timeout(cause):
            self._dump()
            message, reports_first = self._timeout_message(mark, limit), self._reports_first(mark)
            self._post_failure(cause)
            return RankLost(message, reports_first=reports_first, patience=0.0 if reports_first else MESSAGE_SECONDS)
        self._post_failure(cause)
        self._wait_until(lambda: self._first_lost() or self._is_store_silent())
        lost_ranks = self._first_lost() or self._find_missing(mark)[0]
        describe = self._reporter.peers.describe(lost_ranks, lost_ranks) or "a rank that still reports"
        is_certain = any("died" in reason for reason in lost_ranks.values())
        reports_first = is_certain and self._reports_first(mark)
        return RankLost(
            f"{mark.name}: lost {describe}; {cause}", reports_first=reports_first, patience=DEATH_DELAY_SECONDS
        )

    def _first_lost(self) -> dict[int, str]:
        """Lost ranks but those which have failed only because another one was lost before."""
        assert self._reporter is not None
        return {r: why for r, why in self._reporter.peers.lost_ranks().items() if not is_broken_connection(why)}

    def _wait_until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 5 * self._interval
        while not condition() and time.monotonic() < deadline:
            time.sleep(self._tick / 5)
