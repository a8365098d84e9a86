"""Kills, full disks and broken connections while a checkpoint is written."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.checkpoint.cases import (
    run_cli,
)
from tests.checkpoint_jobs import (
    train_and_save,
    train_disconnected,
    train_until_halted,
)
from tests.configs import with_values
from tests.harness import get_free_port, run_ranks
from tests.test_tracking import ROOT, read_rows
from trainer.checkpoint_format import (
    read_manifest,
    verify_files,
)

SAVES = (1, 2, 3, 4)


EVENTS = 120
"""Of writing so many checkpoints with two ranks, on the first rank, at least; see `kill_at_event`."""


@pytest.fixture(scope="module")
def two_rank_run(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any]:
    """A configuration whose checkpoints are written by two ranks, and the losses of its unbroken run."""
    config = with_values(
        base, checkpoint__keep_last=2, deepspeed__zero_optimization={"stage": 1},
        run__output_dir=str(tmp_path_factory.mktemp("unbroken") / "run"),
    )  # fmt: skip
    return config, run_ranks(train_and_save, 2, config, 4, SAVES)[0]


def assert_survives_kill(
    config: dict[str, Any], losses: dict[int, float], event: int, victims: list[int], run: Path
) -> int:
    """Kills ranks at an event of writing checkpoints, starts again, and compares. Returns the step it went on from."""
    config = with_values(config, run__output_dir=str(run))
    with pytest.raises(AssertionError, match=r"died without a word|Connection closed"):
        run_ranks(train_and_save, 2, config, 4, SAVES, event, victims)
    again = run_ranks(train_and_save, 2, config, 4, SAVES)[0]
    assert again == {step: loss for step, loss in losses.items() if step in again}
    assert list(again) == list(range(5 - len(again), 5))
    for folder in sorted((run / "checkpoints").iterdir()):
        if folder.is_dir():
            verify_files(folder, read_manifest(folder))
    assert (run / "checkpoints" / "latest").read_text() == "step-00000004\n"
    return 4 - len(again)


@pytest.mark.parametrize("number", [*range(6), *(pytest.param(n, marks=pytest.mark.soak) for n in range(6, 45))])
def test_kill_during_save_is_survived(number: int, two_rank_run: tuple[Any, Any], tmp_path: Path) -> None:
    """At random instants, between any two system calls of a save; one rank or both."""
    config, losses = two_rank_run
    draw = random.Random(number)
    assert_survives_kill(config, losses, draw.randint(1, EVENTS), draw.choice([[0], [0, 1], [0, 1]]), tmp_path / "run")


@pytest.mark.soak
@pytest.mark.parametrize("number", range(5))
def test_killed_command_resumes(number: int, base: dict[str, Any], tmp_path: Path) -> None:
    """`deepspeed launch/train.py`, both ranks killed at a random instant while it saves at every step, and again."""
    config = with_values(
        base, checkpoint={"every_steps": 1, "keep_last": 2, "asynchronous": number % 2 == 1},
        training={"max_steps": 60, "log_every_steps": 1}, deepspeed__zero_optimization={"stage": 1},
    )  # fmt: skip
    whole = with_values(config, run__output_dir=str(tmp_path / "whole"))
    assert run_cli(whole, tmp_path / "w", world=2).status == 0
    run = tmp_path / "run"
    (tmp_path / "config.json").write_text(json.dumps(with_values(config, run__output_dir=str(run))))
    command = [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_gpus",
        "2",
        "--master_port",
        str(get_free_port()),
        "launch/train.py",
        "--config",
        str(tmp_path / "config.json"),
    ]
    draw, kills = random.Random(number), 0
    for _ in range(20):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        began = len(list(run.glob("checkpoints/step-*"))) and (run / "checkpoints" / "latest").read_text()
        while process.poll() is None and time.monotonic() < deadline and kills < 3:
            latest = run / "checkpoints" / "latest"
            if latest.exists() and latest.read_text() != began:
                time.sleep(draw.uniform(0, 0.5))
                kill_tree(process.pid)
                kills += 1
                break
            time.sleep(0.02)
        if process.wait() == 0:
            break
    assert kills, "the run was over before anything was killed"
    then, now = (curve(read_rows(folder)) for folder in (tmp_path / "whole", run))
    assert now == then
    assert json.loads((run / "config.json").read_text())["tessera"]["finished_step"] == 60


def curve(rows: list[dict[str, Any]]) -> dict[int, float]:
    """The loss of each step, in whichever attempt it was computed last."""
    return {row["step"]: row["loss"] for row in rows if row["split"] == "train"}


def kill_tree(pid: int) -> None:
    """Kills a process and all that it has started, the leaves first."""
    for process in reversed([psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def test_full_disk_does_not_stop_training(base: dict[str, Any], tmp_path: Path) -> None:
    """The second checkpoint does not fit: training goes on, the first one stays as it is."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        config = with_values(base, run__output_dir=str(disk / "run"), deepspeed__zero_optimization={"stage": 1})
        losses = run_ranks(train_and_save, 2, config, 6, (1, 6))[0]
        assert list(losses) == [1, 2, 3, 4, 5, 6]
        (kept,) = (disk / "run" / "checkpoints").glob("step-*")
        verify_files(kept, read_manifest(kept))
        assert not list((disk / "run" / "checkpoints").glob(".step*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_failed_asynchronous_save_is_logged(base: dict[str, Any], tmp_path: Path) -> None:
    """Its thread's failure comes to light at the next save, and the run goes on to its end."""
    run = tmp_path / "run"
    config = with_values(base, run__output_dir=str(run), checkpoint={"every_steps": 2, "asynchronous": True})
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / ".step-00000004.partial").symlink_to("nowhere")  # where a folder is to be
    ended = run_cli(config, tmp_path)
    assert ended.status == 0, ended.err
    assert "step-00000004 was not written" in ended.out
    assert sorted(f.name for f in (run / "checkpoints").glob("*step-*") if f.is_dir()) == [
        "step-00000002",
        "step-00000006",
    ]


def test_failure_of_writer_thread_ends_run(base: dict[str, Any], tmp_path: Path) -> None:
    """At the next save: it must not go on for days without checkpoints."""
    config = with_values(base, run__output_dir=str(tmp_path / "run"), checkpoint={"asynchronous": True})
    with pytest.raises(AssertionError, match="RuntimeError: connection reset by peer"):
        run_ranks(train_disconnected, 1, config)


@pytest.mark.parametrize("stage", [0, 1])
def test_halted_run_finishes_pending_save(stage: int, base: dict[str, Any], tmp_path: Path) -> None:
    """Its exit would end the thread that writes: a loss that is not a number, and an update that was skipped."""
    config = with_values(
        base, run__output_dir=str(tmp_path / "run"), checkpoint={"every_steps": 1, "asynchronous": True},
        deepspeed__optimizer={"type": "SGD", "params": {"lr": 1e38}}, deepspeed__scheduler=None,
        deepspeed__zero_optimization={"stage": stage},
    )  # fmt: skip
    assert run_ranks(train_until_halted, 1, config)[0] == ["latest", "step-00000001"]
    verify_files(saved := tmp_path / "run" / "checkpoints" / "step-00000001", read_manifest(saved))
