"""Supervision of the phases of all ranks: names the ranks that others wait for, and ends a rank that waits too long.

Three threads of a rank take part. The main thread marks its phase (`Phases`, plain attributes). The reporter posts the
mark to the store and reads the others'. The watchdog measures how long the main thread has made no progress, and never
touches the store: it must work when rank 0, which hosts the store, hangs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

from trainer.distributed import Launch, PhaseMark, Phases, Store
from trainer.errors import Preempted, RankLost, TesseraError
from trainer.fault_tolerance.diagnosis import Diagnosis
from trainer.fault_tolerance.failures import cause_of, is_collective_failure, is_timeout
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
"""Shortest interval between two reports of a rank, unless a twentieth of the timeout is shorter."""

PEER_CHECK_SECONDS = 10.0
"""Time without progress after which rank 0 checks for ranks that cannot continue, unless a twentieth of the timeout is
shorter. With it a stopped rank is reported within 30 s, whatever the timeout."""

WAIT_LINE_SECONDS = 30.0
"""Interval between two log lines about the same phase, and time before the first one in phases without a timeout."""

RAISE_SECONDS = 3.0
"""Time after the timeout in which a collective can raise by itself, before the watchdog ends the process."""

MESSAGE_SECONDS = 1.0
"""Delay of the exit of other ranks after the one that reports: a launcher ends all ranks as soon as one exits."""

DEATH_DELAY_SECONDS = 10.0
"""Delay of the exit of other ranks after the death of a rank, whose status should be that of the run."""

_ENDED_BY_WATCHDOG = ("step", "evaluate", "save")
"""Phases that the watchdog ends. In `final` rank 0 works alone for a time, and the collectives of the others raise."""


class Watchdog:
    """Reports the phase of this rank, and ends the rank when it waits longer than the timeout.

    With a single rank there is nothing to wait for, and no thread is started.
    """

    def __init__(self, launch: Launch, store: Store, timeout_seconds: float, directory: RunDirectory) -> None:
        """Start the threads.

        Args:
            launch: This process, as the launcher describes it.
            store: Store of all ranks.
            timeout_seconds: `run.collective_timeout_seconds`.
            directory: The run directory, for stacks in its logs and failures in its events.
        """
        self.phases = Phases(timeout_seconds)
        self._launch, self._directory = launch, directory
        logs = directory.path / "logs"
        self._stacks = logs / f"rank-{launch.rank}.log"
        self._recording = logs / f"flight-recorder-rank-{launch.rank}.json"
        self._interval = min(REPORT_SECONDS, timeout_seconds / 20)
        self._check_after = min(PEER_CHECK_SECONDS, timeout_seconds / 20)
        self._tick = min(1.0, timeout_seconds / 50)
        self._initial_report = initial_report(launch)
        self._error = ""
        self._mark, self._seconds_waited = PhaseMark(), 0.0
        self._logged_at: dict[str, float] = {}
        """Waiting time at the last line of each category, in this phase."""

        self._has_dumped = self._is_closed = False
        self._reporter: Reporter | None = None
        self._diagnosis: Diagnosis | None = None
        if launch.world_size > 1:
            enable_flight_recorder(logs)
            self._reporter = Reporter(launch, store, self._interval, self._report)
            self._diagnosis = Diagnosis(launch, self._reporter, self._interval)
            self._reporter.start()
            threading.Thread(target=self._run, args=(self._diagnosis,), name="watchdog", daemon=True).start()

    def close(self) -> None:
        """End the threads, and report that this rank has finished."""
        self.phases.enter("finished")
        self._is_closed = True
        if self._reporter is not None:
            self._reporter.close(2.0)

    @contextlib.contextmanager
    def explain_failures(self) -> Iterator[None]:
        """Record failures in the context as events, and replace those of collectives by errors that name the lost rank.

        Raises:
            RankLost: in place of the exception of torch if another rank died or did not arrive.
        """
        try:
            yield
        except Preempted:
            raise
        except Exception as error:
            if self._diagnosis is None or isinstance(error, TesseraError) or not is_collective_failure(error):
                cause = str(error) or repr(error)
                self._post_failure(cause)
                self._record(cause, self._launch.rank)
                raise
            failure = self._explain(error, self._diagnosis)
            self._record(str(failure), self._diagnosis.lost_rank(self.phases.mark))
            raise failure from error
        self.close()

    def _record(self, cause: str, rank: int) -> None:
        """Append the event of a failure, on rank 0.

        Args:
            cause: Message of the failure.
            rank: The rank that failed, as far as rank 0 knows.
        """
        if self._launch.rank != 0 or not self._directory.path.is_dir():
            return
        mark = self.phases.mark
        peers = {} if self._diagnosis is None else self._diagnosis.peers.reports()
        host = peers[rank].host if rank in peers else self._initial_report.host
        step = mark.step - 1 if mark.phase == "step" else mark.step
        self._directory.record("failure", step, rank=rank, host=host, phase=mark.name, cause=cause)

    # Reports ----------------------------------------------------------------------------------------------------------

    def _report(self) -> Report:
        report = replace(self._initial_report.with_mark(self.phases.mark), error=self._error)
        if self._seconds_waited < self._interval:
            return report
        location, in_collective = main_thread_location()
        return replace(report, waited=round(self._seconds_waited, 1), location=location, in_collective=in_collective)

    def _post_failure(self, cause: str) -> None:
        self._error = (cause.splitlines() or [""])[0][:300]
        if self._reporter is not None:
            self._reporter.reads_peers = True
            self._reporter.wake()

    # Supervision ------------------------------------------------------------------------------------------------------

    def _run(self, diagnosis: Diagnosis) -> None:
        before = time.monotonic()
        while not self._is_closed:
            time.sleep(self._tick)
            now = time.monotonic()
            # Time in which the process or the host was suspended does not count as waiting time.
            self._check_wait(diagnosis, min(now - before, 3 * self._tick))
            before = now

    def _check_wait(self, diagnosis: Diagnosis, seconds: float) -> None:
        mark, timeout = self.phases.mark, self.phases.timeout
        if mark != self._mark:
            self._mark, self._seconds_waited, self._logged_at, self._has_dumped = mark, 0.0, {}, False
            diagnosis.read_peers(bool(self._error))
            return
        self._seconds_waited += seconds
        if self._error:
            diagnosis.read_peers(True)
        if self._error or self._seconds_waited < self._check_after:
            return
        # All ranks read the reports shortly before the timeout: a collective may raise, and must name the lost rank.
        is_near_timeout = self._seconds_waited > timeout - 5 * self._interval
        diagnosis.read_peers(diagnosis.is_logging_rank() or is_near_timeout)
        if diagnosis.is_logging_rank():
            self._log_waiting(diagnosis, mark, timeout)
        if mark.phase in _ENDED_BY_WATCHDOG and self._seconds_waited >= timeout:
            self._handle_timeout(diagnosis, mark, timeout)

    def _log_waiting(self, diagnosis: Diagnosis, mark: PhaseMark, timeout: float) -> None:
        """Log the missing ranks: at once if they cannot continue, otherwise after a tenth of the timeout."""
        lost, missing = diagnosis.missing_ranks(mark)
        if lost:
            is_due = self._is_line_due("lost")
        else:
            has_timeout = mark.phase in _ENDED_BY_WATCHDOG or mark.phase == "final"
            is_slow = self._seconds_waited >= (timeout / 10 if has_timeout else WAIT_LINE_SECONDS)
            is_due = is_slow and bool(missing or has_timeout) and self._is_line_due("slow")
        if is_due:
            log.warning("%s has taken %.0f s; %s", mark.name, self._seconds_waited, diagnosis.describe(mark))

    def _is_line_due(self, category: str) -> bool:
        last = self._logged_at.get(category)
        if last is not None and self._seconds_waited - last < WAIT_LINE_SECONDS:
            return False
        self._logged_at[category] = self._seconds_waited
        return True

    # Timeout ----------------------------------------------------------------------------------------------------------

    def _handle_timeout(self, diagnosis: Diagnosis, mark: PhaseMark, timeout: float) -> None:
        """Write the stacks, and end the process if its collective does not raise soon."""
        if is_debugged():
            if self._is_line_due("debugger"):
                log.warning("%s has taken %.0f s; not ended in a debugger", mark.name, self._seconds_waited)
            return
        self._dump()
        delay = RAISE_SECONDS + (0 if diagnosis.reports_first(mark) else MESSAGE_SECONDS)
        if self._seconds_waited < timeout + delay:
            return
        cause = self._describe_timeout(diagnosis, mark, timeout)
        if self._error or self._is_closed:  # the main thread has raised meanwhile
            return
        self._record(cause, diagnosis.lost_rank(mark))
        message = f"error (rank {self._launch.rank} on {self._initial_report.host}): {cause}"
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

    def _describe_timeout(self, diagnosis: Diagnosis, mark: PhaseMark, timeout: float) -> str:
        return diagnosis.describe_timeout(mark, timeout, stacks=self._stacks, recording=self._recording)

    def _explain(self, error: Exception, diagnosis: Diagnosis) -> RankLost:
        """Return the error that names the lost ranks. Waits until the store shows them."""
        mark, timeout = self.phases.mark, self.phases.timeout
        cause = cause_of(error)
        if is_timeout(cause):
            self._dump()
            message, reports_first = self._describe_timeout(diagnosis, mark, timeout), diagnosis.reports_first(mark)
            self._post_failure(cause)
            return RankLost(message, reports_first=reports_first, patience=0.0 if reports_first else MESSAGE_SECONDS)
        self._post_failure(cause)
        lost = diagnosis.wait_for_dead_ranks(self._tick / 5) or diagnosis.missing_ranks(mark)[0]
        described = diagnosis.peers.describe(lost, lost) or "a rank that still reports"
        is_certain = any("died" in reason for reason in lost.values())
        reports_first = is_certain and diagnosis.reports_first(mark)
        return RankLost(
            f"{mark.name}: lost {described}; {cause}", reports_first=reports_first, patience=DEATH_DELAY_SECONDS
        )
