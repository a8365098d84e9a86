"""Stop requests of a rank: signals, the death of its launcher, the time limit.

`StopRequests` listens in a thread, so that it does not depend on the main thread, which may be inside a collective, and
raises nothing into it. `StopAgreement` makes all ranks stop after the same step.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from trainer.errors import Preempted
from trainer.events import read_events
from trainer.fault_tolerance.ancestors import (
    Ancestors,
    Process,
    ProcessWatch,
    find_ancestors,
    seconds_since_start,
    signal_at_parents_death,
)
from trainer.fault_tolerance.run_lock import RunLock
from trainer.json_types import Json
from trainer.run_directory import RunDirectory

log = logging.getLogger(__name__)

INTERRUPTED = 128 + signal.SIGINT
"""Exit status after a second SIGINT: that of a shell for a command ended by Ctrl-C."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_KEEP_IF_IGNORED = (signal.SIGINT, signal.SIGHUP)
"""If these are ignored at the start (`nohup`, a background job of a script), they stay ignored."""

_SAME_INTERRUPT_SECONDS = 1.0
"""Launchers forward a SIGINT that the terminal has sent to the ranks too: within this time it is the same one."""

_POLL_SECONDS = 1.0
"""Interval at which processes without a descriptor are polled."""

_DYING_SECONDS = 0.1
"""The kernel sends SIGTERM when the first thread of the parent dies; after this time all of them have."""

_LAUNCHER_KILL_SECONDS = 30
"""launch.py and torchrun kill a rank that still runs this long after SIGTERM."""

_SLOW_SAVE_SECONDS = 20.0
"""A save of this length, after the steps in progress, may take longer than a launcher waits."""


@dataclass(frozen=True)
class StopRequest:
    """Cause and time of the request to stop a rank."""

    cause: str
    monotonic: float
    """`time.monotonic()` in seconds."""


class StopRequests:
    """The stop requests of this rank.

    A stop request is SIGTERM, SIGUSR1, SIGINT or SIGHUP, the death of a process that started this rank, or on rank 0
    the end of `training.max_seconds`. Before the first step there is nothing to save, and a request ends the process at
    once with the status of `Preempted`. Afterwards the request is kept for the training loop. `install` must be called
    before this rank waits for another one: nothing else would end it if its launcher died.
    """

    def __init__(self, rank: int = 0) -> None:
        self._rank = rank
        self._request: StopRequest | None = None
        self._lock = threading.Lock()
        self._is_training = False
        self._directory: RunDirectory | None = None
        self._max_seconds: float | None = None
        self._first_interrupt: float | None = None
        self._run_lock = RunLock()
        self._previous_handlers: dict[
            signal.Signals, signal.Handlers | Callable[[int, FrameType | None], object] | int | None
        ]
        self._previous_handlers = {}

    @property
    def request(self) -> StopRequest | None:
        """The first stop request; later ones change nothing."""
        return self._request

    def install(self, max_seconds: float | None = None) -> None:
        """Start listening. Main thread only.

        Args:
            max_seconds: Time limit from the start of this process; ignored on other ranks than 0.
        """
        self._max_seconds = max_seconds if self._rank == 0 else None
        ancestors = find_ancestors()
        self._wakeup_reader, self._wakeup_writer = socket.socketpair()
        for end in (self._wakeup_reader, self._wakeup_writer):
            end.setblocking(False)
        signal.set_wakeup_fd(self._wakeup_writer.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            if number not in _KEEP_IF_IGNORED or signal.getsignal(number) != signal.SIG_IGN:
                self._previous_handlers[number] = signal.signal(number, _ignore)
                signal.siginterrupt(number, False)
        os.register_at_fork(after_in_child=self._release_in_child)
        thread = threading.Thread(target=self._listen, args=(ancestors,), name="stop requests", daemon=True)
        thread.start()

    def begin_run(self, directory: RunDirectory, lock: RunLock) -> None:
        """Let rank 0 record a stop before the first step in `directory`, and a stop mark `lock`."""
        self._directory, self._run_lock = directory if self._rank == 0 else None, lock
        self._warn_about_slow_saves()

    def begin_training(self) -> None:
        """Keep requests for the training loop from now on."""
        with self._lock:
            self._is_training = True

    def release(self) -> None:
        """Let signals end this process again: a rank that has failed must not delay its launcher. Main thread only."""
        if self._previous_handlers:
            signal.set_wakeup_fd(-1)
        while self._previous_handlers:
            number, before = self._previous_handlers.popitem()
            signal.signal(number, before if before is not None else signal.SIG_DFL)

    def _release_in_child(self) -> None:
        """Restore the signal handlers in a forked child, whose signals are not stop requests of this rank."""
        self.release()

    def _listen(self, ancestors: Ancestors) -> None:
        """Wait for stop requests, in the thread."""
        if ancestors.missing:
            self._add_request(f"{ancestors.missing} had ended")
        parent = ancestors.processes[0] if ancestors.processes else None
        process_watch = ProcessWatch(ancestors.processes)
        if parent is not None and parent.role is not None and not signal_at_parents_death(parent):
            self._add_request(f"{parent} has ended")
        while True:
            readable = self._wait(process_watch)
            for process in process_watch.pop_dead(
                [descriptor for descriptor in readable if descriptor != self._wakeup_reader.fileno()]
            ):
                self._add_request(f"{process} has ended")
            if self._max_seconds is not None and seconds_since_start() >= self._max_seconds:
                self._add_request(f"training.max_seconds ({self._max_seconds:g}) is over")
                self._max_seconds = None
            if self._wakeup_reader.fileno() in readable:
                for number in self._wakeup_reader.recv(4096):
                    self._handle_signal(number, parent)

    def _wait(self, process_watch: ProcessWatch) -> list[int]:
        """Wait for readable descriptors, at most until the next poll or the time limit."""
        poll = select.poll()
        for descriptor in (self._wakeup_reader.fileno(), *process_watch.descriptors):
            poll.register(descriptor, select.POLLIN)
        limits = [_POLL_SECONDS] if process_watch.needs_polling else []
        if self._max_seconds is not None:
            limits.append(min(3600.0, max(0.0, self._max_seconds - seconds_since_start())))
        return [descriptor for descriptor, _ in poll.poll(1000 * min(limits) + 1 if limits else None)]

    def _handle_signal(self, number: int, parent: Process | None) -> None:
        """Handle a signal, which the kernel may have sent because the parent died."""
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._first_interrupt is not None and now - self._first_interrupt >= _SAME_INTERRUPT_SECONDS:
                _exit_now(INTERRUPTED, "stopped by a second SIGINT; progress since the last checkpoint is lost")
            self._first_interrupt = self._first_interrupt or now
        if number in self._previous_handlers:
            if number == signal.SIGTERM and parent is not None:
                time.sleep(_DYING_SECONDS)
                if os.getppid() != parent.pid:
                    self._add_request(f"{parent} has ended")
            self._add_request(signal.Signals(number).name)

    def _add_request(self, cause: str) -> None:
        with self._lock:
            if self._request is not None:
                return
            self._request = StopRequest(cause, time.monotonic())
            if not self._is_training:
                self._exit_before_training(cause)
        log.warning(
            "stopping: %s. The steps in progress are completed and a checkpoint is saved; after the last step the "
            "final model is written instead",
            cause,
        )
        self._run_lock.mark_stopping()

    def _exit_before_training(self, cause: str) -> None:
        """Exit at once: nothing has to be saved, and no other rank waits."""
        if self._rank:
            _exit_now(Preempted.exit_status)
        if self._directory is not None and self._directory.path.is_dir():
            step = (self._last_save() or {}).get("step")
            self._directory.record("preempted", step if isinstance(step, int) else 0, cause=cause)
        _exit_now(Preempted.exit_status, f"stopped before the first step: {cause}. Start the same command again")

    def _last_save(self) -> Mapping[str, Json] | None:
        """Return the newest event of a checkpoint."""
        events = read_events(self._directory.path) if self._directory is not None else []
        return next((event for event in reversed(events) if event["event"] == "save"), None)

    def _warn_about_slow_saves(self) -> None:
        """Warn at the start of the run, because a stop leaves no time for it."""
        save = self._last_save()
        seconds = save.get("seconds") if save else None
        if isinstance(seconds, int | float) and seconds > _SLOW_SAVE_SECONDS:
            log.warning(
                "the last checkpoint took %.0f s; launchers kill a rank %d s after SIGTERM, perhaps before the next "
                "one is saved. To stop without this limit, send SIGUSR1 to a rank or set training.max_seconds",
                seconds,
                _LAUNCHER_KILL_SECONDS,
            )


def _ignore(number: int, frame: FrameType | None) -> None:
    """Replace the default action of a signal; the thread reads its number from the wakeup descriptor."""


def _exit_now(status: int, message: str = "") -> NoReturn:
    """End the process from the thread. Does not log: the main thread may hold the lock of the logger."""
    if message:
        with contextlib.suppress(OSError):
            os.write(2, f"[tessera] {message}\n".encode())
    os._exit(status)
