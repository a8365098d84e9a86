"""Runs a function, or a command, on several real processes over gloo, with real DeepSpeed, a few seconds a time.

A server process imports everything once and forks the ranks (`multiprocessing`'s forkserver), so that a rank
starts in milliseconds and its parent has never run a thread or a backward pass.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import runpy
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from trainer.distributed import get_free_port

TIMEOUT_SECONDS = 300.0
"""Time limit of ranks without a result."""

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tools.preload"])


def start_server() -> None:
    """Start the server that forks the ranks now, so that it imports while this process imports.

    Otherwise the first ranks start it.
    """
    forkserver.ensure_running()


def _rank(
    function: Callable[..., Any], arguments: tuple[Any, ...], rank: int, world: int, port: int, pipe: Connection
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    torch.set_num_threads(1)
    # Plain gloo: no shared-memory extension, no 69 MB file a rank.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            result = function(*arguments)
        pipe.send((True, result))
    except BaseException:
        pipe.send((False, f"rank {rank} of {world}:\n{traceback.format_exc()}\n{output.getvalue()[-2000:]}"))
    finally:
        pipe.close()
        os._exit(0)


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
    """Run `function(*arguments)` on each of `world` ranks. Return the results by rank.

    `function` must be at the top level of a module, and its arguments and results must be picklable. Fails as soon as
    one rank fails, with that rank's traceback.
    """
    port = get_free_port()
    pipes, processes = [], []
    for rank in range(world):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(function, arguments, rank, world, port, sender), daemon=True)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    results: dict[int, Any] = {}
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        while len(results) < world:
            ready = wait([p for r, p in enumerate(pipes) if r not in results], timeout=deadline - time.monotonic())
            if not ready:
                raise AssertionError(
                    f"ranks {sorted(set(range(world)) - set(results))} timed out after {TIMEOUT_SECONDS} s"
                )
            for pipe in ready:
                rank = pipes.index(pipe)
                try:
                    succeeded, results[rank] = pipe.recv()
                except EOFError:
                    raise AssertionError(f"rank {rank} of {world} exited without a result") from None
                if not succeeded:
                    raise AssertionError(results[rank])
    finally:
        for process in processes:
            process.join(2)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(world)]


@dataclass(frozen=True)
class RankOverride:
    """Settings of a single rank of a command that differ from those of the other ranks."""

    arguments: tuple[str, ...] = ()
    """Arguments after those of all ranks."""

    working_folder: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that override those of a launcher."""


@dataclass(frozen=True)
class CommandResult:
    """Result of a command."""

    status: int
    out: str
    err: str
    """Output of the first rank."""

    errors: tuple[str, ...] = ()
    """Standard error of each rank."""


def _command(
    script: str, arguments: list[str], out: str, err: str, environment: dict[str, str], folder: str | None
) -> None:
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    # A parent that pytest runs in has replaced these.
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
    os.environ.update(environment)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    if folder is not None:
        os.chdir(folder)
    sys.argv = [script, *arguments]
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as exited:
        sys.stdout.flush()
        os._exit(exited.code if isinstance(exited.code, int) else 0 if exited.code is None else 1)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


@dataclass(frozen=True)
class RunningCommand:
    """A running command."""

    processes: tuple[Any, ...]
    """By rank; a rank's process id is `pid`."""

    folder: Path

    def output(self, rank: int = 0) -> str:
        """Return what a rank has written to its standard output so far."""
        return self._text(f"out-{rank}")

    def errors(self, rank: int = 0) -> str:
        """Return what a rank has written to its standard error so far."""
        return self._text(f"err-{rank}")

    def _text(self, name: str) -> str:
        file = self.folder / name
        return file.read_text() if file.exists() else ""  # a rank may end before it has one

    def statuses(self, seconds: float) -> list[int | None]:
        """Wait for all ranks. Return the exit status of each; None for one that still runs."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]


@contextlib.contextmanager
def running_command(
    script: str,
    *arguments: str,
    world: int = 1,
    working_folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    variants: Mapping[int, RankOverride] | None = None,
) -> Iterator[RunningCommand]:
    """Run `python SCRIPT ARGUMENTS...` on `world` ranks, without the five seconds of imports.

    Forked processes run the script as `__main__`, each with its own file descriptors, environment and exit status. On
    leaving the `with` block they are killed.

    Args:
        script: Path of the script.
        *arguments: Arguments of its command line.
        world: Number of ranks.
        working_folder: Default: that of this process.
        environment: Variables to set; PYTHONPATH comes first.
        variants: By rank, settings that differ from those of the other ranks.
    """
    port = str(get_free_port())
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(world):
            out, err = Path(folder) / f"out-{rank}", Path(folder) / f"err-{rank}"
            variables = dict(environment or {})
            if world > 1:
                variables |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world),
                    "LOCAL_WORLD_SIZE": str(world),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                    "OMP_NUM_THREADS": "1",
                }
            variant = (variants or {}).get(rank, RankOverride())
            variables |= variant.environment
            directory = variant.working_folder or working_folder
            process = context.Process(
                target=_command,
                args=(
                    script,
                    [*arguments, *variant.arguments],
                    str(out),
                    str(err),
                    variables,
                    directory and str(directory),
                ),
            )
            process.start()
            processes.append(process)
        try:
            yield RunningCommand(tuple(processes), Path(folder))
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def run_command(script: str, *arguments: str, world: int = 1, **where: Any) -> CommandResult:
    """Run `python SCRIPT ARGUMENTS...` on `world` ranks to its end; see `running_command`.

    As under a launcher, the command's status is that of the first rank that fails, and the others are ended then.

    Raises:
        AssertionError: if ranks still run after `TIMEOUT_SECONDS`; they are killed.
    """
    with running_command(script, *arguments, world=world, **where) as started:
        status = _status(started.processes)
        for process in started.processes:
            if process.is_alive():
                process.kill()
            process.join()
        assert status is not None, f"{script} {arguments}: still running after {TIMEOUT_SECONDS} s"
        errors = tuple(started.errors(rank) for rank in range(world))
        return CommandResult(status, started.output(), errors[0], errors)


def _status(processes: Sequence[Any]) -> int | None:
    """Return the status of the first process that fails, 0 if all succeed; None if some run longer than the timeout."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    running = {process.sentinel: process for process in processes}
    while running:
        exited = wait(list(running), timeout=deadline - time.monotonic())
        if not exited:
            return None
        for process in [running.pop(sentinel) for sentinel in exited]:
            process.join()  # a forked process closes its sentinel before its status can be read
            if process.exitcode:
                return int(process.exitcode)
    return 0


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Set the time limit of ranks and commands within the context."""
    global TIMEOUT_SECONDS
    previous, TIMEOUT_SECONDS = TIMEOUT_SECONDS, seconds
    try:
        yield
    finally:
        TIMEOUT_SECONDS = previous
