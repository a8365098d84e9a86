"""The command-line tool for checkpoints: list, show, verify, diff, export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.cases import MODELS, flip_bit, run_cli, run_tool
from tests.configs import with_values
from trainer.checkpoint_format import checksum


def test_tool_lists_shows_verifies_and_compares_checkpoints(uploaded_run: Path, tmp_path: Path) -> None:
    run = uploaded_run / "run"
    listed = run_tool("list", run)
    assert listed.status == 0, listed.err
    assert [line.split()[1] for line in listed.out.splitlines() if "step-" in line] == [
        "step-00000006",
        "step-00000004",
    ]
    assert "latest" in listed.out
    shown = run_tool("show", run, "--tensors")
    tokens = json.loads((run / "metrics.jsonl").read_text().splitlines()[-2])["tokens"]
    assert 72 * 32 - 31 <= tokens <= 72 * 32, "at most one of the samples is the padded one"
    assert f"6 (attempt 1), 72 samples, {tokens:,} tokens" in shown.out
    assert "exp_avg_sq   model.embed_tokens.weight [320, 32] F32" in shown.out
    assert run_tool("verify", run).out.count(": valid (2 files") == 2
    differing = run_tool("diff", run / "checkpoints" / "step-00000004", run)
    assert differing.status == 1
    assert "0 tensors are equal bit for bit" in differing.out
    assert run_tool("diff", run, uploaded_run / "copies" / "step-00000006").status == 0


def test_tool_reports_damaged_and_missing_checkpoints(uploaded_run: Path, tmp_path: Path) -> None:
    damaged_run = tmp_path / "damaged"
    shutil.copytree(uploaded_run / "run" / "checkpoints", damaged_run / "checkpoints")
    flip_bit(damaged_run / "checkpoints" / "step-00000006" / "rank-00000.safetensors")
    damaged = run_tool("verify", damaged_run)
    assert damaged.status == 4
    assert "step-00000006/rank-00000.safetensors: damaged" in damaged.out
    missing = run_tool("show", tmp_path)
    assert missing.status == 4
    assert "not a checkpoint: it has no manifest.json" in missing.err


def test_tool_escapes_control_characters_of_manifest(uploaded_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step-00000006"
    shutil.copytree(uploaded_run / "run" / "checkpoints" / "step-00000006", folder)
    manifest = folder / "manifest.json"
    body = json.loads(manifest.read_text())
    del body["checksum"]
    body["created"] = "today\x1b[2J"
    manifest.write_text(json.dumps({**body, "checksum": checksum(body)}))
    assert r"today\x1b[2J, commit" in run_tool("show", folder).out


@pytest.mark.parametrize("model", ["tied", "gpt2", "mixtral"])
def test_export_equals_final_model(model: str, base: dict[str, Any], tmp_path: Path) -> None:
    """In several files; and in bf16 with the rounding of that dtype."""
    config = with_values(base, run__output_dir=str(tmp_path / "run"), **MODELS[model], training__max_steps=2)
    ended = run_cli(config, tmp_path)
    assert ended.status == 0, ended.err
    out = run_tool("export", tmp_path / "run", tmp_path / "hf", "--check", "--shard_gigabytes", "0.00005")
    assert out.status == 0, out.out + out.err
    assert "check passed: logits differ by 0 from" in out.out
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    assert "| steps | 2 |" in (tmp_path / "hf" / "README.md").read_text()
    tensors = {}
    for file in (tmp_path / "hf").glob("*.safetensors"):
        tensors |= load_file(file)
    final = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert tensors.keys() == final.keys()
    assert all(tensors[name].equal(final[name]) for name in final)
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "hf" / file).read_text() == (tmp_path / "run" / "final" / file).read_text()
    half = run_tool("export", tmp_path / "run", tmp_path / "half", "--dtype", "bf16", "--check")
    assert half.status == 0, half.out + half.err
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    again = run_tool("export", tmp_path / "run", tmp_path / "hf")
    assert again.status == 2
    assert "is not empty" in again.err
