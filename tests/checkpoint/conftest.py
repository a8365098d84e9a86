"""Runs that several checkpoint tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.cases import RunUnbroken, UnbrokenRun, run_cli, run_config, validation_sources
from tests.checkpoint_jobs import train_and_save
from tests.configs import tiny_config, with_values
from tests.harness import run_ranks
from tools.parity.layout import Layout


@pytest.fixture(scope="session")
def base(corpus: Path, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Epochs of 40 samples, steps of 12: step 3 ends within the first epoch, and step 4 in the second."""
    config = tiny_config(corpus, shared_cache, tmp_path_factory.mktemp("runs"))
    config["data"]["train"][0]["weight"] = 0.36
    return with_values(
        config,
        data__validation=[],
        training__max_steps=6,
        deepspeed__train_batch_size=12,
        deepspeed__train_micro_batch_size_per_gpu=1,
        deepspeed__scheduler={"type": "WarmupCosineLR", "params": {"warmup_num_steps": 2, "total_num_steps": "auto"}},
    )


@pytest.fixture(scope="session")
def unbroken_run(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> RunUnbroken:
    """Run a model in a layout once, for all tests that resume from it."""
    runs: dict[str, UnbrokenRun] = {}

    def run(model: str, layout: Layout, **values: Any) -> UnbrokenRun:
        key = json.dumps([model, repr(layout), values])
        if key not in runs:
            folder = tmp_path_factory.mktemp("unbroken")
            config = run_config(base, model, layout, folder, **values)
            runs[key] = UnbrokenRun(folder, run_ranks(train_and_save, layout.world_size, config, 6, (3, 6))[0])
        return runs[key]

    return run


@pytest.fixture(scope="session")
def uploaded_run(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the command on two ranks, in `run`, with checkpoints after steps 2, 4 and 6, uploaded to `copies`."""
    folder = tmp_path_factory.mktemp("uploaded")
    config = with_values(
        base,
        run__output_dir=str(folder / "run"),
        training__log_every_steps=1,
        evaluation={"every_steps": 2, "max_batches": 1},
        data__validation=validation_sources(base),
        checkpoint={"every_steps": 2, "keep_last": 2, "upload": f"file://{folder}/copies"},
        tracking={"wandb": {"mode": "offline"}},
        deepspeed__zero_optimization={"stage": 1},
    )
    ended = run_cli(config, folder, world=2)
    assert ended.status == 0, ended.err
    assert "deleting" in ended.out
    return folder
