"""Content of the lock file of a run directory: the process that holds the lock."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Literal

from trainer.fault_tolerance.processes import process_namespace, process_stat

_CONTENT_BYTES = 512

State = Literal["running", "stopping"]


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, as recorded in the lock file."""

    host: str
    pid: int
    started: int
    """See `ProcessStat.start_ticks`."""

    machine: str
    """Boot and process namespace in which `pid` is valid."""

    since: str
    """UTC, ISO 8601."""

    state: State = "running"

    @property
    def is_local(self) -> bool:
        """True if this process can observe it."""
        return self.machine == process_namespace()

    @property
    def is_alive(self) -> bool:
        """True if it still runs; valid only if it is local."""
        stat = process_stat(self.pid)
        return stat is not None and stat.start_ticks == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def current_process() -> Holder:
    """Return the record of this process."""
    since = datetime.now(UTC).isoformat(sep=" ", timespec="seconds").replace("+00:00", " UTC")
    stat = process_stat(os.getpid())
    started = 0 if stat is None else stat.start_ticks
    return Holder(socket.gethostname(), os.getpid(), started, process_namespace(), since)


def is_same_process(first: Holder, second: Holder) -> bool:
    """Return True if two records are of one process."""
    return (first.machine, first.pid, first.started) == (second.machine, second.pid, second.started)


def write_holder(descriptor: int, holder: Holder) -> None:
    """Write in place and in one call, so that no reader sees a partial record."""
    text = json.dumps(asdict(holder)).encode()
    os.pwrite(descriptor, text.ljust(_CONTENT_BYTES - 1) + b"\n", 0)
    os.ftruncate(descriptor, max(_CONTENT_BYTES, len(text) + 1))
    os.fsync(descriptor)


def read_holder(descriptor: int) -> Holder | None:
    """Read the record; None if the file is empty or has other content."""
    try:
        return Holder(**json.loads(os.pread(descriptor, 4 * _CONTENT_BYTES, 0)))
    except (ValueError, TypeError, RecursionError):
        return None
