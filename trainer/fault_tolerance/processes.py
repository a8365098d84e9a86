"""Processes of this host, as /proc has them."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import NamedTuple


class ProcessStat(NamedTuple):
    """Some fields of /proc/PID/stat (`man proc_pid_stat`)."""

    state: str
    """One letter, such as R (running), S (sleeping), T (stopped), Z (zombie)."""

    parent: int
    session: int
    start_ticks: int
    """Clock ticks from the host's boot to the process's start: tells a process from a later one with its id."""

    @property
    def is_dead(self) -> bool:
        """Whether it has ended; its parent may not have waited for it yet."""
        return self.state in "ZX"

    @property
    def is_stopped(self) -> bool:
        """Whether SIGSTOP or a debugger has stopped it."""
        return self.state in "Tt"


def process_stat(pid: int) -> ProcessStat | None:
    """None where there is no such process, or it is hidden."""
    try:
        # The second field is a name in parentheses, which may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return ProcessStat(fields[0], int(fields[1]), int(fields[3]), int(fields[19]))
    except (OSError, ValueError, IndexError):
        return None


def process_namespace() -> str:
    """Host, boot and namespace in which this process's ids have a meaning: equal for two processes that see each
    other."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
