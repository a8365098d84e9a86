"""Every benchmark's short round: the command works, and prints and writes its rows."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_command
from tools.bench.__main__ import BENCHMARKS
from tools.bench.launches import rank_processes

ROWS: dict[str, list[str]] = {
    "overhead": ["bare torch", "plain DeepSpeed", "Tessera"],
    "states": [f"{stage}  {kind}" for stage in range(4) for kind in ("fp32", "bf16")],
    "data": ["waiting for data", "1,000,000,000"],
    "traffic": ["Tessera     whole", "Tessera       cut", "AutoTP     whole", "AutoTP: the sum", "Tessera: the sum"],
    "pipeline": ["1f1b", "dualpipev", "0 to 1  activations", "1 to 0    gradients", "llama, tensor 2      1"],
    "checkpoint": [
        "save, against dd conv=fsync",
        "load, against a sequential read",
        "gathering of the weights by DeepSpeed",
        "asynchronous stall, share of a save",
        "bytes, relative to the minimum",
        "files",
        "memory in addition to the state, loading",
    ],
    "replicas": ["fp32, ZeRO 0", "fp32, ZeRO 1", "bf16, ZeRO 1"],
    "guards": [
        "stop look-up after a step",
        "releasing the run lock",
        "comparing the ranks at the start",
        "guards, CPU time",
        "until all ranks have ended",
        "not in a short round",
        "ranks left after 10 s",
        "limit 4 s: named after",
        "the other ends, beyond the limit",
        "rank stopped, default limit, 1800 s: named after",
    ],
}
"""Text that its tables must contain."""


LONG = ("replicas", "guards")
"""Benchmarks whose short round is too long for `make test`."""

SIGNED = {"guards": "step_difference_seconds"}
"""A figure that noise may make negative."""


def numbers(figures: Any) -> Iterator[float]:
    """All numbers in the output of a benchmark."""
    if isinstance(figures, dict | list):
        for value in figures.values() if isinstance(figures, dict) else figures:
            yield from numbers(value)
    elif isinstance(figures, int | float):
        yield figures


def test_every_benchmark_has_quick_options() -> None:
    assert set(ROWS) == set(BENCHMARKS)


@pytest.mark.fast
def test_launch_ranks_are_found_while_alive(tmp_path: Path) -> None:
    script, config = tmp_path / "train.py", tmp_path / "config.json"
    script.write_text("import time; time.sleep(60)")
    rank = subprocess.Popen([sys.executable, str(script), "--config", str(config)])
    other = subprocess.Popen([sys.executable, str(script), "--config", str(tmp_path / "another.json")])
    try:
        deadline = time.monotonic() + 10
        while not rank_processes(config) and time.monotonic() < deadline:
            time.sleep(0.01)  # between fork and exec
        assert [one.pid for one in rank_processes(config)] == [rank.pid]
    finally:
        rank.kill()
        other.kill()
        os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOWAIT)
    assert not rank_processes(config), "dead, though nobody has waited for it"
    rank.wait()
    other.wait()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.matrix] if name in LONG else []) for name in ROWS]
)
def test_quick_benchmark_runs(name: str, tmp_path: Path) -> None:
    written = tmp_path / "figures.json"
    folder = ["--folder", str(tmp_path)] if name == "checkpoint" else []
    ended = run_command("tools/bench/__main__.py", name, "--quick", "--json", str(written), *folder)
    assert ended.status == 0, ended.out + ended.err
    for row in ROWS[name]:
        assert row in ended.out, f"{row} is missing in\n{ended.out}"
    assert "nan" not in ended.out
    figures = json.loads(written.read_text())["figures"]
    if name in SIGNED:
        assert math.isfinite(figures.pop(SIGNED[name]))
    found = list(numbers(figures))
    assert len(found) > 4
    assert all(math.isfinite(number) and number >= 0 for number in found)
    if name == "overhead":
        (case,) = figures.values()
        accelerate = importlib.util.find_spec("accelerate") is not None
        assert ("HF Trainer + DeepSpeed" in case["medians"]) == accelerate
        assert ("without HF Trainer: " in ended.out) != accelerate
        assert min(case["medians"].values()) > 0
