"""Stop requests: from a signal, a launcher's death or the clock to one step at which all ranks save and end.

`StopRequests` listens in a thread, so that nothing is raised into a collective and a main thread that is inside of one
is no obstacle. `StopAgreement`, in `agreement.py`, makes all ranks stop after the same step.
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
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

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
from trainer.run_directory import RunDirectory

log = logging.getLogger(__name__)

INTERRUPTED = 128 + signal.SIGINT
"""Exit status after a second SIGINT: a shell's for a command that Ctrl-C has ended."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_KEEP_IF_IGNORED = (signal.SIGINT, signal.SIGHUP)
"""Where these are ignored (`nohup`, a background job of a script), they stay so."""

_SAME_INTERRUPT_SECONDS = 1.0
"""Launchers hand a SIGINT on that a terminal has sent to the ranks already: one within this time is the same."""

_POLL_SECONDS = 1.0
"""Between two looks at processes that have no descriptor."""

_DYING_SECONDS = 0.1
"""The kernel sends SIGTERM when the first thread of the parent dies; by then all have, and the cause can be told."""

_LAUNCHER_KILL_SECONDS = 30
"""So long after SIGTERM launch.py and torchrun kill a rank that still lives."""

_SLOW_SAVE_SECONDS = 20.0
"""A save of this length, and the steps in progress before it, may take longer than a launcher waits."""


@dataclass(frozen=True)
class StopRequest:
    """Why a rank is to stop, and since when."""

    cause: str
    monotonic: float
    """`time.monotonic()` in seconds."""


class StopRequests:
    """This rank's. A stop request is SIGTERM, SIGUSR1, SIGINT or SIGHUP, the death of a process that started this rank,
    or `training.max_seconds` on rank 0.

    Before the first step there is nothing to save: a request ends the process at once, with the status of `Preempted`.
    From then on it is kept until the training loop asks. Nothing happens before `install`, which comes before this rank
    waits for another one: nobody else would end it if its launcher died.
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
        """The first one; later ones change nothing."""
        return self._request

    def install(self, max_seconds: float | None = None) -> None:
        """Listen from now on; call it in the main thread.

        Args:
            max_seconds: from this process's start; rank 0's counts.
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
        """From now on rank 0 records there that it stops before the first step; `lock` says when this rank stops."""
        self._directory, self._run_lock = directory if self._rank == 0 else None, lock
        self._warn_about_slow_saves()

    def begin_training(self) -> None:
        """From now on a request waits for the training loop."""
        with self._lock:
            self._is_training = True

    def release(self) -> None:
        """Let signals end this process again, as a rank that has failed must not hold up its launcher. Call it in the
        main thread."""
        if self._previous_handlers:
            signal.set_wakeup_fd(-1)
        while self._previous_handlers:
            number, before = self._previous_handlers.popitem()
            signal.signal(number, before if before is not None else signal.SIG_DFL)

    def _release_in_child(self) -> None:
        """In a forked child: its signals are its own, and not this rank's."""
        self.release()

    def _listen(self, ancestors: Ancestors) -> None:
        """The thread."""
        if ancestors.missing:
            self._add_request(f"{ancestors.missing} had ended")
        parent = ancestors.processes[0] if ancestors.processes else None
        process_watch = ProcessWatch(ancestors.processes)
        if parent is not None and parent.role is not None and not signal_at_parents_death(parent):
            self._add_request(f"{parent} has ended")
        while True:
            readable = self._wait(process_watch)
            for process in process_watch.pop_dead([one for one in readable if one != self._wakeup_reader.fileno()]):
                self._add_request(f"{process} has ended")
            if self._max_seconds is not None and seconds_since_start() >= self._max_seconds:
                self._add_request(f"training.max_seconds ({self._max_seconds:g}) is over")
                self._max_seconds = None
            if self._wakeup_reader.fileno() in readable:
                for number in self._wakeup_reader.recv(4096):
                    self._handle_signal(number, parent)

    def _wait(self, process_watch: ProcessWatch) -> list[int]:
        """Descriptors that have something to tell, after at most as long as may pass without looking."""
        poll = select.poll()
        for descriptor in (self._wakeup_reader.fileno(), *process_watch.descriptors):
            poll.register(descriptor, select.POLLIN)
        limits = [_POLL_SECONDS] if process_watch.needs_polling else []
        if self._max_seconds is not None:
            limits.append(min(3600.0, max(0.0, self._max_seconds - seconds_since_start())))
        return [descriptor for descriptor, _ in poll.poll(1000 * min(limits) + 1 if limits else None)]

    def _handle_signal(self, number: int, parent: Process | None) -> None:
        """A signal, which may be the kernel's at the parent's death."""
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._first_interrupt is not None and now - self._first_interrupt >= _SAME_INTERRUPT_SECONDS:
                _exit_now(INTERRUPTED, "stopped by a second SIGINT; what was not saved is lost")
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
        log.warning("stopping: %s. The steps in progress are completed, then a checkpoint is saved; after the last "
                    "step the final model is written", cause)  # fmt: skip
        self._run_lock.mark_stopping()

    def _exit_before_training(self, cause: str) -> None:
        """There is nothing to save, and no other rank to wait for."""
        if self._rank:
            _exit_now(Preempted.exit_status)
        if self._directory is not None and self._directory.path.is_dir():
            save = self._last_save()
            self._directory.record("preempted", save["step"] if save else 0, cause=cause)
        _exit_now(Preempted.exit_status, f"stopped before the first step: {cause}. Start the same command again")

    def _last_save(self) -> dict[str, Any] | None:
        """The newest event of a checkpoint."""
        events = read_events(self._directory.path) if self._directory is not None else []
        return next((event for event in reversed(events) if event["event"] == "save"), None)

    def _warn_about_slow_saves(self) -> None:
        """Ahead of a stop, because there is no time for it then."""
        save = self._last_save()
        seconds = save.get("seconds") if save else None
        if isinstance(seconds, int | float) and seconds > _SLOW_SAVE_SECONDS:
            log.warning(
                "the last checkpoint took %.0f s. Launchers kill a rank %d s after SIGTERM, maybe before one is "
                "written. To stop without such a limit, send SIGUSR1 to a rank or set training.max_seconds",
                seconds, _LAUNCHER_KILL_SECONDS,
            )  # fmt: skip


def _ignore(number: int, frame: FrameType | None) -> None:
    """The thread reads the signal's number from the wakeup descriptor; this only keeps the default away."""


def _exit_now(status: int, message: str = "") -> NoReturn:
    """Ends the process from the thread. No logger: the main thread may hold its lock."""
    if message:
        with contextlib.suppress(OSError):
            os.write(2, f"[tessera] {message}\n".encode())
    os._exit(status)
