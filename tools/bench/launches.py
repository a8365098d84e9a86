"""Real launches by the `deepspeed` command: starting one, waiting until it trains, finding its ranks."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from trainer.distributed import get_free_port
from trainer.fault_tolerance.ancestors import Process, read_process

ROOT = Path(__file__).parents[2]

_START_SECONDS = 300.0


def processes_of(config: Path) -> list[Process]:
    """Live processes of the launch whose configuration is this file."""
    processes = (read_process(int(path.name)) for path in Path("/proc").glob("[0-9]*"))
    return [
        process
        for process in processes
        if process is not None and str(config) in process.command and not process.stat.is_dead
    ]


def rank_processes(config: Path) -> list[Process]:
    """Ranks among them."""
    return [
        process
        for process in processes_of(config)
        if process.role is None and any(word.endswith("train.py") for word in process.command[:6])
    ]


@contextlib.contextmanager
def launched(config: Path, ranks: int = 2) -> Iterator[subprocess.Popen[bytes]]:
    """Run `deepspeed launch/train.py --config CONFIG` on CPUs; its output goes to a file `.out` next to the file.

    On leaving the `with` block all processes that it has started are killed.
    """
    folder = Path(sys.executable).parent
    path = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": path}
    words = [
        str(folder / "deepspeed"),
        "--num_gpus",
        str(ranks),
        "--master_port",
        str(get_free_port()),
        "launch/train.py",
        "--config",
        str(config),
    ]
    with config.with_suffix(".out").open("wb") as output:
        command = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield command
    finally:
        for process in processes_of(config):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        command.wait()


def wait_for_steps(run: Path, steps: int, status: Callable[[], int | None], output: Callable[[], str]) -> None:
    """Wait until a run that logs every step has trained a number of steps.

    Args:
        run: Its run directory.
        steps: Number of steps.
        status: Of the command; None while it runs.
        output: Returns its output, for the message.

    Raises:
        RuntimeError: it has ended, or does not train within five minutes.
    """
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + _START_SECONDS
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        if status() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{run.name} has not reached step {steps}:\n{output()[-3000:]}")
        time.sleep(0.02)
