"""Mutated configurations and damaged files of a run: a documented exit status, no traceback, no hang."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests.configs import with_values
from tests.harness import run_command
from tests.mutations import damage, mutated_json

TRAIN = str(Path(__file__).parent.parent / "launch" / "train.py")
TIMEOUT_SECONDS = 60
"""Limit for one command, on a busy machine."""

FILES = (
    "run/config.json",
    "run/checkpoints/*/manifest.json",
    "run/checkpoints/latest",
    "run/metrics.jsonl",
    "run/events.jsonl",
    "cache/**/*.idx",
    "cache/**/*.bin",
    "cache/**/complete.json",
)
STATUSES = (0, 2, 3, 4)


def end_of(config: Path, *arguments: str) -> str:
    """Run the command; return why its end is not acceptable, or an empty string."""
    start = time.monotonic()
    ended = run_command(TRAIN, "--config", str(config), *arguments, working_folder=config.parent)
    said = ended.out + ended.err
    if ended.status not in STATUSES or "Traceback" in said or "\x1b" in said:
        return f"status {ended.status}: {said[-2500:]}"
    seconds = time.monotonic() - start
    return "" if seconds < TIMEOUT_SECONDS else f"{seconds:.0f} s"


def test_traceback_is_detected(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise SystemError\n")
    ended = run_command(str(tmp_path / "broken.py"))
    assert ended.status not in STATUSES
    assert "Traceback" in ended.err


def mutated_configurations(tiny: dict[str, Any], folder: Path, seeds: range) -> list[str]:
    config = with_values(
        tiny,
        deepspeed__zero_optimization={"stage": 2, "offload_optimizer": {"device": "none"}},
        deepspeed__scheduler={"type": "WarmupCosineLR", "params": {"warmup_num_steps": 2, "total_num_steps": 4}},
        checkpoint={"every_steps": 2, "keep_last": 2, "resume": "auto", "upload": "memory://x/y"},
        parallel={"tensor": 1, "pipeline": 1},
        evaluation={"every_steps": 2},
    )
    wrong = []
    for seed in seeds:
        file = folder / "config.json"
        file.write_bytes(mutated_json(config, random.Random(seed)).encode(errors="surrogateescape"))
        if problem := end_of(file, "--dry_run"):
            wrong.append(f"seed {seed}: {problem}")
    return wrong


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two steps in a folder that also has the configuration and the token cache."""
    from tests.configs import tiny_config

    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(corpus, folder / "cache", folder / "run")
    config = with_values(
        config,
        training__max_steps=2,
        checkpoint={"every_steps": 1},
        data__validation=None,
        run__output_dir="run",
        data__cache_dir="cache",
    )
    (folder / "config.json").write_text(json.dumps(config))
    assert not end_of(folder / "config.json")
    return folder


def damaged_runs(trained: Path, folder: Path, seeds: range) -> list[str]:
    wrong = []
    for seed in seeds:
        rng, copy = random.Random(seed), folder / str(seed)
        shutil.copytree(trained, copy, symlinks=True)
        pattern = FILES[seed % len(FILES)]
        files = sorted(copy.glob(pattern))
        assert files, pattern
        file = rng.choice(files)
        how = damage(file, rng)
        if problem := end_of(copy / "config.json", "--set", "training.max_steps=3"):
            wrong.append(f"seed {seed}, {file.relative_to(copy)}, {how}: {problem}")
        shutil.rmtree(copy)
    return wrong


def test_mutated_configuration_ends_without_traceback(tiny: dict[str, Any], tmp_path: Path) -> None:
    assert not (wrong := mutated_configurations(tiny, tmp_path, range(40))), "\n".join(wrong)


def test_damaged_run_ends_without_traceback(trained: Path, tmp_path: Path) -> None:
    assert not (wrong := damaged_runs(trained, tmp_path, range(8))), "\n".join(wrong)


@pytest.mark.matrix
def test_many_mutated_configurations_end_without_traceback(tiny: dict[str, Any], tmp_path: Path) -> None:
    assert not (wrong := mutated_configurations(tiny, tmp_path, range(40, 200))), "\n".join(wrong)


@pytest.mark.matrix
def test_many_damaged_runs_end_without_traceback(trained: Path, tmp_path: Path) -> None:
    assert not (wrong := damaged_runs(trained, tmp_path, range(8, 148))), "\n".join(wrong)
