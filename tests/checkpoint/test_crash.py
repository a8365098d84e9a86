"""Kills, full disks and broken connections while a checkpoint is written."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.checkpoint.cases import run_cli
from tests.checkpoint_jobs import train_and_save, train_disconnected, train_until_halted
from tests.commands import ROOT, read_rows
from tests.configs import with_values
from tests.harness import deepspeed_command, run_ranks
from trainer.checkpoint_format import read_manifest, verify_files

SAVES = (1, 2, 3, 4)


EVENTS = 120
"""Lower bound of the events of writing these checkpoints with two ranks, on rank 0; see `kill_at_event`."""


@pytest.fixture(scope="module")
def two_rank_run(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any]:
    """Return a configuration whose checkpoints two ranks write, and the losses of its unbroken run."""
    config = with_values(
        base,
        checkpoint__keep_last=2,
        deepspeed__zero_optimization={"stage": 1},
        run__output_dir=str(tmp_path_factory.mktemp("unbroken") / "run"),
    )
    return config, run_ranks(train_and_save, 2, config, 4, SAVES)[0]


def assert_survives_kill(config: dict[str, Any], losses: dict[int, float], event: int, victims: list[int]) -> None:
    """Kill ranks at an event of writing checkpoints, start again, and compare with the unbroken run."""
    with pytest.raises(AssertionError, match=r"exited without a result|Connection (closed|reset)"):
        run_ranks(train_and_save, 2, config, 4, SAVES, event, victims)
    resumed_losses = run_ranks(train_and_save, 2, config, 4, SAVES)[0]
    assert resumed_losses == {step: loss for step, loss in losses.items() if step in resumed_losses}
    assert list(resumed_losses) == list(range(5 - len(resumed_losses), 5))
    run = Path(config["run"]["output_dir"])
    for folder in sorted((run / "checkpoints").iterdir()):
        if folder.is_dir():
            verify_files(folder, read_manifest(folder))
    assert (run / "checkpoints" / "latest").read_text() == "step-00000004\n"


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(6, 45))])
def test_kill_during_save_is_survived(seed: int, two_rank_run: tuple[Any, Any], tmp_path: Path) -> None:
    """At random, between any two system calls of a save; of one rank or of both."""
    config, losses = two_rank_run
    draw = random.Random(seed)
    event, victims = draw.randint(1, EVENTS), draw.choice([[0], [0, 1], [0, 1]])
    assert_survives_kill(with_values(config, run__output_dir=str(tmp_path / "run")), losses, event, victims)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(5))
def test_killed_command_resumes(seed: int, base: dict[str, Any], tmp_path: Path) -> None:
    """`deepspeed launch/train.py`, which saves at every step, with both ranks killed at random, several times."""
    config = with_values(
        base,
        checkpoint={"every_steps": 1, "keep_last": 2, "asynchronous": seed % 2 == 1},
        training={"max_steps": 60, "log_every_steps": 1},
        deepspeed__zero_optimization={"stage": 1},
    )
    unbroken = with_values(config, run__output_dir=str(tmp_path / "unbroken"))
    assert run_cli(unbroken, tmp_path / "u", world=2).status == 0
    run = tmp_path / "run"
    (tmp_path / "config.json").write_text(json.dumps(with_values(config, run__output_dir=str(run))))
    command = deepspeed_command("--config", str(tmp_path / "config.json"))
    draw, kills = random.Random(seed), 0
    for _ in range(20):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        first_latest = len(list(run.glob("checkpoints/step-*"))) and (run / "checkpoints" / "latest").read_text()
        while process.poll() is None and time.monotonic() < deadline and kills < 3:
            latest = run / "checkpoints" / "latest"
            if latest.exists() and latest.read_text() != first_latest:
                time.sleep(draw.uniform(0, 0.5))
                kill_tree(process.pid)
                kills += 1
                break
            time.sleep(0.02)
        if process.wait() == 0:
            break
    assert kills, "the run was over before anything was killed"
    expected_losses, losses = (last_losses(read_rows(folder)) for folder in (tmp_path / "unbroken", run))
    assert losses == expected_losses
    assert json.loads((run / "config.json").read_text())["tessera"]["finished_step"] == 60


def last_losses(rows: list[dict[str, Any]]) -> dict[int, float]:
    """Return the loss of each step, from the last attempt that took it."""
    return {row["step"]: row["loss"] for row in rows if row["split"] == "train"}


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants, children first."""
    for process in reversed([psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def test_full_disk_does_not_stop_training(base: dict[str, Any], tmp_path: Path) -> None:
    """The second checkpoint does not fit: training continues, and the first one is unchanged."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        config = with_values(base, run__output_dir=str(disk / "run"), deepspeed__zero_optimization={"stage": 1})
        losses = run_ranks(train_and_save, 2, config, 6, (1, 6))[0]
        assert list(losses) == [1, 2, 3, 4, 5, 6]
        (first,) = (disk / "run" / "checkpoints").glob("step-*")
        verify_files(first, read_manifest(first))
        assert not list((disk / "run" / "checkpoints").glob(".step*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_failed_asynchronous_save_is_logged(base: dict[str, Any], tmp_path: Path) -> None:
    """At the next save; the run trains to its end."""
    run = tmp_path / "run"
    config = with_values(base, run__output_dir=str(run), checkpoint={"every_steps": 2, "asynchronous": True})
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / ".step-00000004.partial").symlink_to("nowhere")  # where the save creates a folder
    ended = run_cli(config, tmp_path)
    assert ended.status == 0, ended.err
    assert "step-00000004 was not written" in ended.out
    assert sorted(f.name for f in (run / "checkpoints").glob("*step-*") if f.is_dir()) == [
        "step-00000002",
        "step-00000006",
    ]


def test_failure_of_writer_thread_ends_run(base: dict[str, Any], tmp_path: Path) -> None:
    """At the next save: a run must not train for days without checkpoints."""
    config = with_values(base, run__output_dir=str(tmp_path / "run"), checkpoint={"asynchronous": True})
    with pytest.raises(AssertionError, match="RuntimeError: connection reset by peer"):
        run_ranks(train_disconnected, 1, config)


@pytest.mark.parametrize("stage", [0, 1])
def test_halted_run_finishes_pending_save(stage: int, base: dict[str, Any], tmp_path: Path) -> None:
    """Its exit would end the writer thread; with a loss of NaN (ZeRO 0), and with a skipped update (ZeRO 1)."""
    config = with_values(
        base,
        run__output_dir=str(tmp_path / "run"),
        checkpoint={"every_steps": 1, "asynchronous": True},
        deepspeed__optimizer={"type": "SGD", "params": {"lr": 1e38}},
        deepspeed__scheduler=None,
        deepspeed__zero_optimization={"stage": stage},
    )
    assert run_ranks(train_until_halted, 1, config)[0] == ["latest", "step-00000001"]
    verify_files(saved := tmp_path / "run" / "checkpoints" / "step-00000001", read_manifest(saved))
