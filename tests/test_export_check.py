"""`export --check` accepts the rounding of half precision and rejects any other difference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.configs import with_values
from tests.harness import CommandResult, run_command
from trainer.checkpoint.export import compare_logits

ROOT = Path(__file__).parent.parent
LAST = "checkpoints/step-00000002"


@pytest.fixture(scope="module")
def run(corpus: Path, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a model whose logits are as large as those of a trained model of billions of parameters."""
    from tests.configs import tiny_config

    folder = tmp_path_factory.mktemp("export")
    values = {"model__config__initializer_range": 0.8, "training__max_steps": 2, "data__validation": []}
    config = with_values(tiny_config(corpus, shared_cache, folder / "run"), **values)
    (folder / "config.json").write_text(json.dumps(config))
    ended = run_command(str(ROOT / "launch" / "train.py"), "--config", str(folder / "config.json"))
    assert ended.status == 0, ended.err
    return folder / "run"


def export(run: Path, folder: Path, dtype: str) -> CommandResult:
    arguments = ("export", str(run), str(folder), "--dtype", dtype, "--check")
    return run_command(str(ROOT / "tools" / "checkpoint.py"), *arguments)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_export_check_accepts_rounding_of_large_logits(dtype: str, run: Path, tmp_path: Path) -> None:
    ended = export(run, tmp_path / "out", dtype)
    assert ended.status == 0, ended.out + ended.err
    assert "check passed: logits differ by 0 from" in ended.out
    comparison = compare_logits(
        run / LAST, tmp_path / "out", {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    )
    assert comparison.largest > 16
    assert comparison.difference == 0
    assert (comparison.rounding > 1e-2) == (dtype != "fp32"), "half precision rounds"
    assert ("rounding the weights" in ended.out) == (dtype != "fp32")


@pytest.mark.parametrize("change", ["one ulp of one weight", "two rows of the head swapped", "a NaN"])
def test_export_check_detects_damage(change: str, run: Path, tmp_path: Path) -> None:
    """One ulp of one weight out of 20,000 changes logits far less than the rounding of all of them does."""
    assert export(run, tmp_path / "out", "bf16").status == 0
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    head, norm = tensors["lm_head.weight"], tensors["model.norm.weight"]
    if change.startswith("one ulp"):
        norm[3] = norm[3] * (1 + 2**-7)
    elif change.startswith("two rows"):
        head[[1, 2]] = head[[2, 1]]
    else:
        head[0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    comparison = compare_logits(run / LAST, tmp_path / "out", torch.bfloat16)
    assert not comparison.is_good
    if change.startswith("one ulp"):
        assert comparison.difference < 2 * comparison.rounding
