"""The command trains, saves, resumes, evaluates and exports families whose layers differ, in every kind of layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.commands import read_rows
from tests.harness import run_command
from tools.bench.common import inline
from tools.parity.shrink import tiny as tiny_family
from trainer.data.indexed import IndexedWriter
from trainer.model import load_exported

LAYOUTS = {
    "tensor": {"parallel": {"tensor": 2}},
    "pipeline": {"parallel": {"pipeline": 2}},
}


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two token files, `train.bin` and `validation.bin`."""
    folder, draw = tmp_path_factory.mktemp("tokens"), np.random.default_rng(0)
    for name in ("train", "validation"):
        with IndexedWriter(folder / name, np.uint16) as writer:
            for _ in range(20):
                writer.add(draw.integers(5, 256, 100).tolist())
    return folder


def config_of(model_type: str, tokens: Path, output: Path, **sections: Any) -> dict[str, Any]:
    return {
        "run": {"output_dir": str(output), "seed": 5},
        "model": {"config": inline(tiny_family(model_type))},
        "data": {
            "train": [{"path": str(tokens / "train.bin")}],
            "validation": [{"path": str(tokens / "validation.bin")}],
            "sequence_length": 32,
        },
        "training": {"max_steps": 3, "log_every_steps": 1},
        "evaluation": {"max_batches": 1},
        "checkpoint": {"every_steps": 2, "keep_last": 3},
        "deepspeed": {
            "train_batch_size": 4, "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "gradient_clipping": 0.5,
        },
        **sections,
    }  # fmt: skip


def train(config: dict[str, Any], *arguments: str, world: int = 1) -> list[tuple[str, float]]:
    """(split, loss) of every row that the command writes."""
    output = Path(config["run"]["output_dir"])
    path = output.with_suffix(".json")
    path.write_text(json.dumps(config))
    ended = run_command("launch/train.py", "--config", str(path), *arguments, world=world)
    assert ended.status == 0, ended.out + ended.err
    return [(row["split"], row["loss"]) for row in read_rows(output)]


@pytest.mark.parametrize(
    "model_type",
    ["gemma4_text", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("gemma4", "dots3_note_text"))],
)
def test_train_command_trains_families_with_mixed_layers(model_type: str, tokens: Path, tmp_path: Path) -> None:
    whole = train(config_of(model_type, tokens, tmp_path / "one"))
    exported = load_exported(tmp_path / "one" / "final")
    weights = {name: tensor.float() for name, tensor in exported.state_dict().items()}
    for name, sections in LAYOUTS.items():
        sharded = config_of(model_type, tokens, tmp_path / name, **sections)
        losses = train(sharded, world=2)
        assert [split for split, _ in losses] == [split for split, _ in whole]
        assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in whole], rel=2e-6), name
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name / "final")
        for key, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, weights[key], atol=1e-5, rtol=0, msg=f"{name}: {key}")
        # The last step once more, from a checkpoint that one process has written.
        again = config_of(model_type, tokens, tmp_path / f"{name}-again", **sections)
        resumed = train(again, "--resume", str(tmp_path / "one" / "checkpoints" / "step-00000002"), world=2)
        assert [loss for _, loss in resumed] == pytest.approx([loss for _, loss in whole[-2:]], rel=2e-6), name
