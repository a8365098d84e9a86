"""The processes that started this rank, up to and including the command that a user types, and when one of them dies.

A launcher that is killed leaves its ranks behind: `deepspeed` starts launch.py, which starts the ranks, and a signal to
the first reaches neither of the others. So each rank watches all of them.
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
"""A `runner` is the command that a user types, `deepspeed` or `torchrun`. DeepSpeed's starts a `launcher` (launch.py)
on each host, on another host below the `session` process of its SSH server."""

_RUNNER_COMMANDS = ("deepspeed", "deepspeed.pt", "ds", "torchrun")
_RUNNER_MODULES = ("deepspeed.launcher.runner", "torch.distributed.run", "torch.distributed.launch")
_LAUNCHER_MODULES = ("deepspeed.launcher.launch",)
_RUNNER_FLAGS = ("--enable_each_rank_log=", "--log_level=")
_LAUNCHED_RANK_VARIABLES = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")
"""Environment variables of ranks that launch.py, or torchrun, has started."""

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Process:
    """A process of this host. Its id may be used again after its death; together with the start time it is unique."""

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
        """What it has to do with starting ranks; None for others, such as a shell between two of them."""
        word = _script_words(self.command)[0]
        module = word.removesuffix(".py").replace("/", ".")
        if any(f".{module}".endswith(f".{name}") for name in _LAUNCHER_MODULES):
            return "launcher"
        if Path(word).name in _RUNNER_COMMANDS or any(f".{module}".endswith(f".{name}") for name in _RUNNER_MODULES):
            return "runner"
        return "session" if word.startswith("sshd") or Path(word).name.startswith("sshd") else None


@dataclass(frozen=True)
class Ancestors:
    """What started this rank."""

    processes: tuple[Process, ...] = ()
    """Those whose death ends the run, nearest first, the runner last; none where there is no launcher."""

    missing: str | None = None
    """A process that has died already: its remains tell that there must be one."""

    @property
    def runner(self) -> Process | None:
        """`deepspeed` or `torchrun`, where it runs on this host."""
        return next((process for process in self.processes if process.role == "runner"), None)

    @property
    def launcher(self) -> Process | None:
        """DeepSpeed's launch.py of this host."""
        return next((process for process in self.processes if process.role == "launcher"), None)


def _script_words(command: Sequence[str]) -> list[str]:
    """A command from its script, or the name of its module, on."""
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
    """The process as /proc has it; None where there is none, or it is hidden."""
    stat = process_stat(pid)
    try:
        command = (Path("/proc") / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    return None if stat is None else Process(pid, stat, tuple(command))


def seconds_since_start() -> float:
    """How long this process runs."""
    stat = process_stat(os.getpid())
    if stat is None:
        return 0.0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - stat.start_ticks / os.sysconf("SC_CLK_TCK"))


def find_ancestors() -> Ancestors:
    """The processes that started this rank, as far as they are the launcher's.

    None under plain `python`: a shell's death ends no run. On another host than `deepspeed`'s the last one is the SSH
    server's process of this connection, which dies with it, unless `nohup` or `setsid` stands between.
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
    """All ancestors, nearest first, and whether they are known up to the first process of the host or container."""
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
    """Whether a launcher has started this process, and not in a container inside of which it cannot be seen: there the
    process group or session has no number."""
    return any(name in os.environ for name in _LAUNCHED_RANK_VARIABLES) and os.getpgrp() != 0 and os.getsid(0) != 0


def signal_at_parents_death(parent: Process) -> bool:
    """Let the kernel send SIGTERM when the parent dies. Returns False if it is dead already."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    return os.getppid() == parent.pid


class ProcessWatch:
    """Tells when one of some processes dies: by their process descriptors, or where a kernel has none by looking."""

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
        """Become readable when their process dies."""
        return iter(self._by_descriptor)

    @property
    def needs_polling(self) -> bool:
        """Whether some have no descriptor, so that `pop_dead` has to be called from time to time."""
        return bool(self._polled)

    def pop_dead(self, readable: Sequence[int] = ()) -> list[Process]:
        """Those that have died, each told once.

        Args:
            readable: of the descriptors.
        """
        dead = [process for process in self._polled if not _is_alive(process)]
        self._polled = [process for process in self._polled if process not in dead]
        for descriptor in readable:
            dead.append(self._by_descriptor.pop(descriptor))
            os.close(descriptor)
        return dead


def _open_descriptor(process: Process) -> int | None:
    """A descriptor of the process; None where the kernel has none, or it has died."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except (OSError, AttributeError):
        return None
    if _is_alive(process):
        return descriptor
    os.close(descriptor)  # the id may be another process's by now
    return None


def _is_alive(process: Process) -> bool:
    current = process_stat(process.pid)
    return current is not None and current.start_ticks == process.stat.start_ticks and not current.is_dead
