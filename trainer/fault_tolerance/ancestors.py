"""Detection of the death of the processes that started this rank, up to the command that a user types.

A killed launcher leaves its ranks running: `deepspeed` starts launch.py, which starts the ranks, and a signal to the
first process reaches none of the others. So each rank watches all of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.fault_tolerance.processes import ProcessStat, process_stat

Role = Literal["runner", "launcher", "session"]
"""A `runner` is the command that a user types, `deepspeed` or `torchrun`. DeepSpeed's runner starts a `launcher`
(launch.py) on each host; on other hosts its parent is the `session` process of the SSH server."""

_RUNNER_COMMANDS = ("deepspeed", "deepspeed.pt", "ds", "torchrun")
_RUNNER_MODULES = ("deepspeed.launcher.runner", "torch.distributed.run", "torch.distributed.launch")
_LAUNCHER_MODULES = ("deepspeed.launcher.launch",)
_RUNNER_FLAGS = ("--enable_each_rank_log=", "--log_level=")
_LAUNCHED_RANK_VARIABLES = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")
"""Environment variables of ranks that launch.py or torchrun started."""

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Process:
    """A process of this host. Its id may be reused after its death, and is unique together with the start time."""

    pid: int
    stat: ProcessStat
    command: tuple[str, ...]

    def __str__(self) -> str:
        name = (
            "launch.py" if self.role == "launcher" else Path(_script_words(self.command)[0].split()[0]).name.rstrip(":")
        )
        return f"{name} (process {self.pid})"

    @property
    def role(self) -> Role | None:
        """Role in starting ranks; None for other processes, such as a shell between two of them."""
        word = _script_words(self.command)[0]
        module = word.removesuffix(".py").replace("/", ".")
        if any(f".{module}".endswith(f".{name}") for name in _LAUNCHER_MODULES):
            return "launcher"
        if Path(word).name in _RUNNER_COMMANDS or any(f".{module}".endswith(f".{name}") for name in _RUNNER_MODULES):
            return "runner"
        return "session" if word.startswith("sshd") or Path(word).name.startswith("sshd") else None


@dataclass(frozen=True)
class Ancestors:
    """Processes that started this rank."""

    processes: tuple[Process, ...] = ()
    """Processes whose death ends the run, nearest first, the runner last; empty without a launcher."""

    missing: str | None = None
    """Name of a process that must have existed and has died already."""

    @property
    def runner(self) -> Process | None:
        """`deepspeed` or `torchrun`, if it runs on this host."""
        return next((process for process in self.processes if process.role == "runner"), None)

    @property
    def launcher(self) -> Process | None:
        """DeepSpeed's launch.py of this host."""
        return next((process for process in self.processes if process.role == "launcher"), None)


def _script_words(command: Sequence[str]) -> list[str]:
    """Strip the interpreter and its options: return the words from the script or module name on."""
    words = [word for word in command if word] or ["?"]
    if not Path(words[0]).name.startswith(("python", "pypy")):
        return words
    rest = words[1:]
    while rest and rest[0].startswith("-") and rest[0] != "-m":
        rest = rest[2:] if rest[0] in ("-X", "-W") else rest[1:]
    if rest[:1] == ["-m"]:
        rest = rest[1:]
    return words if "-c" in words[: len(words) - len(rest)] else rest or words


def read_process(pid: int) -> Process | None:
    """Read a process from /proc; None if it does not exist or is hidden."""
    stat = process_stat(pid)
    try:
        command = (Path("/proc") / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    return None if stat is None else Process(pid, stat, tuple(command))


def seconds_since_start() -> float:
    """Return the age of this process in seconds."""
    stat = process_stat(os.getpid())
    if stat is None:
        return 0.0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - stat.start_ticks / os.sysconf("SC_CLK_TCK"))


def find_ancestors() -> Ancestors:
    """Find the processes of the launcher that started this rank.

    Returns none under plain `python`: the death of a shell does not end a run. On other hosts than that of `deepspeed`
    the last process is the SSH server's for this connection, which ends with the connection, unless the command runs
    under `nohup` or `setsid`.
    """
    lineage, is_complete = _read_lineage()
    roles = [process.role for process in lineage]
    if "runner" in roles and "session" not in roles[: roles.index("runner")]:
        return Ancestors(tuple(lineage[: roles.index("runner") + 1]))
    if "launcher" not in roles:
        return Ancestors(missing="the launcher" if is_complete and _was_launched() else None)
    last = roles.index("launcher")
    if "session" in roles[last:]:
        session = roles.index("session")
        is_attached = (
            signal.getsignal(signal.SIGHUP) != signal.SIG_IGN and os.getsid(0) == lineage[session - 1].stat.session
        )
        return Ancestors(tuple(lineage[: (session if is_attached else last) + 1]))
    is_local = not any(word.startswith("--node_rank") for word in lineage[last].command)
    by_runner = all(any(word.startswith(key) for word in lineage[last].command) for key in _RUNNER_FLAGS)
    return Ancestors(
        tuple(lineage[: last + 1]), missing="deepspeed" if is_complete and is_local and by_runner else None
    )


def _read_lineage() -> tuple[list[Process], bool]:
    """Return all ancestors, nearest first, and True if they reach the first process of the host or container."""
    lineage: list[Process] = []
    pid = os.getppid()
    while pid:
        process = read_process(pid)
        if process is None:
            return lineage, False
        lineage.append(process)
        pid = process.stat.parent
    return lineage, True


def _was_launched() -> bool:
    """Return True if a launcher has started this process inside this container.

    A launcher outside of the container is invisible; the process group or session is 0 then.
    """
    return any(name in os.environ for name in _LAUNCHED_RANK_VARIABLES) and os.getpgrp() != 0 and os.getsid(0) != 0


def signal_at_parents_death(parent: Process) -> bool:
    """Ask the kernel to send SIGTERM when the parent dies. Returns False if it is dead already."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    return os.getppid() == parent.pid


class ProcessWatch:
    """Detects the death of processes by their process descriptors; by polling if the kernel has none."""

    def __init__(self, processes: Sequence[Process]) -> None:
        self._by_descriptor: dict[int, Process] = {}
        self._polled: list[Process] = []
        for process in processes:
            descriptor = _open_descriptor(process)
            if descriptor is None:
                self._polled.append(process)
            else:
                self._by_descriptor[descriptor] = process

    @property
    def descriptors(self) -> Iterator[int]:
        """Descriptors, readable after the death of their process."""
        return iter(self._by_descriptor)

    @property
    def needs_polling(self) -> bool:
        """True if a process has no descriptor, so that `pop_dead` must be called regularly."""
        return bool(self._polled)

    def pop_dead(self, readable: Sequence[int] = ()) -> list[Process]:
        """Return the processes that have died since the last call.

        Args:
            readable: The readable ones of `descriptors`.
        """
        dead = [process for process in self._polled if not _is_alive(process)]
        self._polled = [process for process in self._polled if process not in dead]
        for descriptor in readable:
            dead.append(self._by_descriptor.pop(descriptor))
            os.close(descriptor)
        return dead


def _open_descriptor(process: Process) -> int | None:
    """Open a descriptor of the process; None if the kernel has none, or the process has died."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except (OSError, AttributeError):
        return None
    if _is_alive(process):
        return descriptor
    os.close(descriptor)  # the id may belong to another process by now
    return None


def _is_alive(process: Process) -> bool:
    current = process_stat(process.pid)
    return current is not None and current.start_ticks == process.stat.start_ticks and not current.is_dead
