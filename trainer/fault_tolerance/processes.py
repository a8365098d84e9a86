"""Processes of this host, read from /proc."""

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
    """Clock ticks from the boot of the host to the start of the process; distinguishes later processes of this id."""

    @property
    def is_dead(self) -> bool:
        """True if it has ended, even if its parent has not waited for it yet."""
        return self.state in "ZX"

    @property
    def is_stopped(self) -> bool:
        """True if SIGSTOP or a debugger has stopped it."""
        return self.state in "Tt"


def process_stat(pid: int) -> ProcessStat | None:
    """Read the state of a process; None if it does not exist or is hidden."""
    try:
        # The second field is a name in parentheses, which may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return ProcessStat(fields[0], int(fields[1]), int(fields[3]), int(fields[19]))
    except (OSError, ValueError, IndexError):
        return None


def process_namespace() -> str:
    """Identify the host, boot and namespace in which the ids of this process are valid.

    Equal for two processes that can observe each other.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
