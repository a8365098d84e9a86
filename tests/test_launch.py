"""The commands that users type, through the real launchers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.commands import read_rows
from tests.configs import with_values
from tests.harness import deepspeed_command, get_free_port
from trainer.data.indexed import IndexedWriter
from trainer.data.order import SampleOrder

pytestmark = pytest.mark.launcher

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def environment(**values: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **values}


def deepspeed(*arguments: str, ranks: int = 2, **values: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        deepspeed_command(*arguments, ranks=ranks),
        cwd=ROOT,
        env=environment(**values),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_shortened_quickstart_trains(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = deepspeed(
        "--config",
        "ds_configs/quickstart.json",
        "--set",
        "training.max_steps=12",
        "--set",
        "evaluation.max_batches=2",
        "--set",
        f"run.output_dir={run}",
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = read_rows(run)
    held_out = [row["loss"] for row in rows if row["split"] == "validation"]
    assert held_out[0] == pytest.approx(8.35, abs=0.1), "a random model is as good as guessing among 4096"
    assert held_out[-1] < held_out[0] - 1
    assert ended.stdout.count("finished: the model is in") == 1
    assert (run / "final" / "model.safetensors").exists()
    assert list(run.glob("wandb/offline-run-*"))
    assert {f.name for f in (run / "logs").iterdir()} == {"rank-0.log", "rank-1.log"}
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*")), "buffers are left behind"


def test_invalid_configuration_is_reported_once_when_rank_zero_is_slowest(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(with_values(tiny, parallel__tensr=2)))
    (tmp_path / "sitecustomize.py").write_text("import os, time\nif os.environ.get('RANK') == '0': time.sleep(8)\n")
    ended = deepspeed("--config", str(tmp_path / "config.json"), PYTHONPATH=str(tmp_path))
    assert ended.returncode == 2, ended.stdout + ended.stderr
    said = ended.stdout + ended.stderr
    assert said.count("parallel.tensr: unknown key; did you mean 'tensor'?") == 1
    assert "Traceback" not in said
    assert "Initializing" not in said, "no process group was started"


def test_error_of_a_single_rank_is_reported_by_that_rank(tiny: dict[str, Any], tmp_path: Path) -> None:
    """An invalid id that only data rank 1 reads: its message and its status, without rank 0."""
    with IndexedWriter(tmp_path / "tokens", np.uint16) as writer:
        writer.add([1] * (32 * 8 + 1))
    raw = np.fromfile(tmp_path / "tokens.bin", np.uint16)
    order = SampleOrder((8,), (1.0,), tiny["run"]["seed"])
    _, samples = order.lookup(np.arange(8))
    raw[int(samples[2]) * 32 + 5] = 999  # the third sample is in the second micro-batch, which is rank 1's
    raw.tofile(tmp_path / "tokens.bin")
    values = {"data__train": [{"path": str(tmp_path / "tokens.bin")}], "data__validation": []}
    (tmp_path / "config.json").write_text(json.dumps(with_values(tiny, **values)))
    ended = deepspeed("--config", str(tmp_path / "config.json"))
    assert ended.returncode == 3, ended.stdout + ended.stderr
    assert "error (rank 1 on" in ended.stderr
    assert "is 999, outside the model's vocabulary of 320" in ended.stderr


def test_torchrun(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    command = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", str(get_free_port()), "launch/train.py"]
    ended = subprocess.run(
        [*command, "--config", str(tmp_path / "config.json")],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert read_rows(tmp_path / "run")[-1]["step"] == 4


def test_killed_rank_ends_the_run_and_leaves_no_files(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(with_values(tiny, training__max_steps=100_000)))
    command = deepspeed_command("--config", str(tmp_path / "config.json"))
    running = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    pattern = f"train.py --local_rank=1 --config {tmp_path}"
    found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=True)
    children = found.stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert running.wait(90) not in (0, None)
    for line in metrics.read_text().splitlines():
        json.loads(line)
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*")), "a kill leaves nothing"
