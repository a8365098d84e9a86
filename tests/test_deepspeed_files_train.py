"""DeepSpeed files of other trainers, completed, through the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.configs import with_values
from tests.harness import run_command
from tests.test_deepspeed_files import BATCH, FILES, write

TRAIN = str(Path(__file__).parent.parent / "launch" / "train.py")


@pytest.mark.parametrize("name", ["huggingface_zero2", "huggingface_zero3", "axolotl_zero1"])
def test_deepspeed_file_trains(name: str, tiny: dict[str, Any], tmp_path: Path) -> None:
    file = next(file for file in FILES if file.stem == name)
    over: dict[str, Any] = {**BATCH, "optimizer": {"type": "AdamW", "params": {"lr": 0.002}}}
    if name.startswith("huggingface"):
        over["scheduler"] = {"params": {"warmup_num_steps": 2}}
    path = write(tmp_path, with_values(tiny, data__validation=None), {"extends": str(file), **over})
    ended = run_command(TRAIN, "--config", str(path))
    assert ended.status == 0, ended.err
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
