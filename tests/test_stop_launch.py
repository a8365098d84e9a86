"""Stop requests through the launchers that users type: exit status, remaining processes, saved state."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.configs import with_values
from tests.harness import deepspeed_command, get_free_port
from tests.test_launch import BIN, ROOT, environment
from trainer.events import read_events
from trainer.fault_tolerance.ancestors import Process, read_process

pytestmark = pytest.mark.launcher

ENDED_SECONDS = 25.0
"""Seconds from a signal until all ranks have ended; the benchmark measures it on a larger model."""


@dataclass(frozen=True)
class Run:
    """A running training command."""

    command: subprocess.Popen[bytes]
    config: Path
    folder: Path

    def processes(self, word: str) -> list[Process]:
        """Return the live processes whose command has a word with this ending."""
        found = (read_process(int(path.name)) for path in Path("/proc").glob("[0-9]*"))
        return [
            process
            for process in found
            if process is not None
            and str(self.config) in process.command
            and not process.stat.is_dead
            and any(text.endswith(word) for text in process.command[:6])
        ]

    @property
    def ranks(self) -> list[Process]:
        return [process for process in self.processes("train.py") if process.role is None]

    @property
    def launcher(self) -> Process:
        (found,) = self.processes("deepspeed.launcher.launch")
        return found

    @property
    def events(self) -> list[dict[str, Any]]:
        return read_events(self.folder)

    def wait_for_ranks(self, seconds: float = ENDED_SECONDS) -> float:
        """Wait until all ranks have ended; return the seconds."""
        begun = time.monotonic()
        while self.ranks:
            assert time.monotonic() < begun + seconds, f"{self.ranks} are left, {self.events[-1]}"
            time.sleep(0.05)
        return time.monotonic() - begun

    def refuse_unsaved(self, cause: str) -> None:
        """Check that the last attempt saved its last step and recorded the stop with its cause, and no finish."""
        last = self.events[-1]
        assert last["event"] == "preempted"
        assert cause in last["cause"]
        assert (self.folder / "checkpoints" / f"step-{last['step']:08}" / "manifest.json").exists()
        assert json.loads((self.folder / "config.json").read_text())["tessera"]["finished_step"] is None


@pytest.fixture
def config(tiny: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    values = {"training__max_steps": 100_000, "training__log_every_steps": 5, "data__validation": []}
    path.write_text(json.dumps(with_values(tiny, **values)))
    return path


@contextlib.contextmanager
def started(config: Path, *command: str, wrapper: tuple[str, ...] = ()) -> Iterator[Run]:
    """Start the command, wait until it trains, and kill its remaining processes at the end."""
    folder = Path(json.loads(config.read_text())["run"]["output_dir"])
    attempts = sum(event["event"] in ("start", "resume") for event in read_events(folder))
    arguments = ("--config", str(config))
    launch = [str(BIN / command[0]), *command[1:], "launch/train.py", *arguments] if command else None
    with (config.parent / "output").open("ab") as output:
        words = (*wrapper, *(launch or deepspeed_command(*arguments)))
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment(), stdout=output, stderr=output, start_new_session=True
        )
    run = Run(process, config, folder)
    try:
        deadline = time.monotonic() + 150
        metrics = folder / "metrics.jsonl"
        while True:
            rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
            if [row["attempt"] for row in rows].count(attempts + 1) > 2:
                break
            assert process.poll() is None, (config.parent / "output").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield run
    finally:
        for one in [*run.processes("deepspeed.launcher.launch"), *run.ranks]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGKILL)
        process.kill()
        process.wait()


def test_killed_launcher_leaves_no_rank_and_loses_no_step(config: Path) -> None:
    """By SIGTERM of `deepspeed`, SIGKILL of launch.py, and Ctrl-C, in turn; each attempt resumes the run."""
    with started(config) as run:
        run.command.terminate()
        assert run.command.wait(5) == -signal.SIGTERM
        assert len(run.ranks) == 2, "the ranks save"
        run.wait_for_ranks()
        run.refuse_unsaved("deepspeed (process")
    with started(config) as run:
        resumed = run.events[-1]
        assert (resumed["event"], resumed["step"]) == ("resume", run.events[-2]["step"])
        os.kill(run.launcher.pid, signal.SIGKILL)
        assert run.command.wait(5) == 0, "as DeepSpeed has it: the command's status says nothing here"
        run.wait_for_ranks()
        run.refuse_unsaved("launch.py (process")
    with started(config) as run:
        assert run.events[-1]["step"] == run.events[-2]["step"]
        os.killpg(run.command.pid, signal.SIGINT)
        assert run.command.wait(5) == -signal.SIGINT
        run.wait_for_ranks()
        run.refuse_unsaved("SIGINT")
    output = (config.parent / "output").read_text()
    assert output.count("start the same command again") == 3


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("whom", "number", "status", "cause"),
    [
        ("launch.py", signal.SIGTERM, 1, "SIGTERM"),
        ("command", signal.SIGUSR1, -signal.SIGUSR1, "deepspeed (process"),
        ("command", signal.SIGKILL, -signal.SIGKILL, "deepspeed (process"),
        ("rank", signal.SIGTERM, 75, "SIGTERM (rank"),
        ("rank", signal.SIGINT, 75, "SIGINT (rank"),
    ],
)
def test_deepspeed_command_returns_the_status_of_a_stop(
    whom: str, number: int, status: int, cause: str, config: Path
) -> None:
    with started(config) as run:
        pid = {"launch.py": run.launcher.pid, "command": run.command.pid, "rank": run.ranks[-1].pid}[whom]
        os.kill(pid, number)
        assert run.command.wait(60) == status
        run.wait_for_ranks()
        run.refuse_unsaved(cause)


@pytest.mark.matrix
def test_time_limit_saves_and_exits_75(config: Path) -> None:
    config.write_text(json.dumps(with_values(json.loads(config.read_text()), training__max_seconds=30)))
    with started(config) as run:
        assert run.command.wait(120) == 75
        run.refuse_unsaved("training.max_seconds (30) is over")


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_torchrun(number: int, status: int, config: Path) -> None:
    port = str(get_free_port())
    with started(config, "torchrun", "--nproc_per_node", "2", "--master_port", port) as run:
        os.kill(run.command.pid, number)
        assert run.command.wait(60) == status
        run.wait_for_ranks()
        run.refuse_unsaved("torchrun (process" if number == signal.SIGKILL else "SIG")


@pytest.mark.matrix
def test_missing_hostfile_is_refused(config: Path) -> None:
    words = [
        str(BIN / "deepspeed"),
        "--hostfile",
        "hosts",
        "--num_gpus",
        "2",
        "launch/train.py",
        "--config",
        str(config),
    ]
    ended = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert ended.stderr.count("error: --hostfile: hosts is not a file") == 1
