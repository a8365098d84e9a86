"""Runs functions on several real processes, and commands as users type them, a few seconds a time."""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

from tools.ranks import SECONDS, context, run_ranks
from trainer.distributed import free_port

__all__ = ["Finished", "free_port", "run_command", "run_ranks"]


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    status: int
    out: str
    err: str
    """Of the first rank."""

    errors: tuple[str, ...] = ()
    """What each rank wrote to its standard error."""


def _command(script: str, arguments: list[str], out: str, err: str, environment: dict[str, str]) -> None:
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        sys.stdout.flush()
        os._exit(ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def run_command(script: str, *arguments: str, world: int = 1) -> Finished:
    """What `python SCRIPT ARGUMENTS...` does on the first of `world` ranks, without the five seconds of imports: forked
    processes run the script as `__main__`, each with its own file descriptors, environment and exit status."""
    port = str(free_port())
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(world):
            out, err = Path(folder) / f"out-{rank}", Path(folder) / f"err-{rank}"
            environment = {}
            if world > 1:
                environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                               "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                               "OMP_NUM_THREADS": "1"}  # fmt: skip
            process = context.Process(target=_command, args=(script, list(arguments), str(out), str(err), environment))
            process.start()
            processes.append(process)
        processes[0].join(SECONDS)
        assert processes[0].exitcode is not None, f"{script} {arguments}: still running after {SECONDS} s"
        for process in processes[1:]:
            process.join(1 if processes[0].exitcode else 30)  # launchers end all ranks when one fails
            if process.is_alive():
                process.kill()
        errors = tuple((Path(folder) / f"err-{rank}").read_text() for rank in range(world))
        return Finished(processes[0].exitcode, (Path(folder) / "out-0").read_text(), errors[0], errors)
