"""The training command from start to end: rows, run directory, model, and further attempts."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.commands import GENERATE, TRAIN, TRAIN_KEYS, read_rows
from tests.configs import with_values
from tests.harness import CommandResult, run_command
from trainer.config.load import check_config
from trainer.errors import ConfigError
from trainer.run_directory import RunDirectory


def start(tiny: dict[str, Any], folder: Path, **values: Any) -> CommandResult:
    """Run the training command with changed values."""
    path = folder / "config.json"
    path.write_text(json.dumps(with_values(tiny, **values)))
    return run_command(TRAIN, "--config", str(path))


def read_wandb_records(run: Path) -> list[dict[str, Any]]:
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(file)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return [json.loads(line) for line in printed.splitlines() if line.strip()]


def test_command_writes_rows_model_and_wandb_run(tiny: dict[str, Any], tmp_path: Path) -> None:
    """Check the rows, the run directory, the offline W&B run, the model, and the same command again."""
    values = {
        "training__max_steps": 5,
        "evaluation": {"every_steps": 2},
        "tracking": {"wandb": {"mode": "offline"}},
        "data__drop_last": True,
    }
    start_time = time.time()
    ended = start(tiny, tmp_path, **values)
    assert ended.status == 0, ended.err
    run = tmp_path / "run"
    rows = read_rows(run)
    train = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in train] == [1, 2, 4, 5], "step 1, every second, and the last"
    assert [row["step"] for row in rows if row["split"] == "validation"] == [0, 2, 4, 5]
    assert list(train[0]) == TRAIN_KEYS
    assert [row["samples"] for row in train] == [8, 16, 32, 40]
    assert [row["tokens"] for row in train] == [256, 512, 1024, 1280]
    assert {row["mfu"] for row in train} == {None}
    assert all(row["attempt"] == 1 for row in rows)
    assert rows[-1]["perplexity"] == pytest.approx(math.exp(rows[-1]["loss"]))
    assert rows[-1]["loss"] < rows[0]["loss"]

    metadata = json.loads((run / "config.json").read_text())["tessera"]
    assert metadata["finished_step"] == 5
    assert metadata["document_frame"]["suffix_tokens"] == ["<|endoftext|>"]
    assert metadata["versions"]["torch"]
    assert metadata["world"] == {"processes": 1, "data": 1, "pipeline": 1, "tensor": 1}
    assert "training reads" in (run / "logs" / "rank-0.log").read_text()

    records = read_wandb_records(run)
    text = json.dumps(records)
    assert "train/loss" in text
    stamps = [record["history"]["item"]["_timestamp"] for record in records if "history" in record]
    assert len(stamps) == len(rows)
    saved = (run / "checkpoints" / "step-00000005" / "manifest.json").stat().st_mtime
    assert start_time < stamps[0] <= stamps[-1] < saved + 1, (
        "rows keep their own times; wandb's process runs for longer"
    )
    assert "validation/perplexity" in text
    assert "train_micro_batch_size_per_gpu" in text, "the resolved configuration is attached"

    exported_loss = validation_loss_of_exported_model(run, with_values(tiny, **values), tmp_path)
    assert exported_loss == pytest.approx(rows[-1]["loss"], rel=1e-6), "the exported model is the trained one"

    repeated = start(tiny, tmp_path, **values)
    assert repeated.status == 0
    assert "finished at step 5" in repeated.out
    assert read_rows(run) == rows

    other = start(tiny, tmp_path, **{**values, "run__seed": 5, "data__sequence_length": 16})
    assert other.status == 2
    assert "run.seed: 5 here, 11 in the run directory" in other.err
    assert "data.sequence_length: 16 here, 32 in the run directory" in other.err

    generated = run_command(GENERATE, "--run", str(run), "--prompt", "the quick", "--tokens", "5")
    assert generated.status == 0, generated.err
    assert generated.out.startswith("the quick")
    not_a_run = run_command(GENERATE, "--run", str(tmp_path), "--prompt", "x")
    assert not_a_run.status == 2
    assert "has neither a final model nor checkpoints" in not_a_run.err


def validation_loss_of_exported_model(run: Path, tiny: dict[str, Any], tmp_path: Path) -> float:
    """Compute the validation loss of the exported model with Hugging Face alone."""
    import torch
    from torch.nn import functional as F
    from transformers import AutoModelForCausalLM

    from trainer.data import open_batches, prepare_data
    from trainer.topology import Topology

    loaded = check_config(tiny, world_size=1, device="cpu")
    batches = open_batches(loaded, prepare_data(loaded), Topology.of(1, 0)).validation
    assert batches is not None
    model = AutoModelForCausalLM.from_pretrained(run / "final")
    total = tokens = 0.0
    with torch.no_grad():
        for micro in batches:
            logits = model(
                input_ids=micro.inputs["input_ids"], attention_mask=micro.inputs.get("attention_mask")
            ).logits
            labels = micro.labels.flatten()
            total += float(F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=-100, reduction="sum"))
            tokens += int((labels != -100).sum())
    return total / tokens


def test_finished_run_resumes_with_more_steps(tiny: dict[str, Any], tmp_path: Path) -> None:
    final, run = tmp_path / "run" / "final", tmp_path / "run"
    assert start(tiny, tmp_path, training__max_steps=2).status == 0
    before = read_rows(run)
    shutil.rmtree(final)
    assert start(tiny, tmp_path, training__max_steps=2).status == 0
    assert final.is_dir(), "written from the checkpoint"
    assert read_rows(run) == before
    with (run / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 3, "lo')
    assert start(tiny, tmp_path, training__max_steps=4).status == 0
    after = read_rows(run)
    assert after[: len(before)] == before
    added = [(row["step"], row["attempt"]) for row in after[len(before) :]]
    assert added == [(4, 3), (4, 3)], "one row of training, one of validation"
    assert after[-2]["samples"] == 4 * 8
    restarted = start(tiny, tmp_path, training__max_steps=4, checkpoint__resume="never")
    assert "archived 2 checkpoints up to step-00000004" in restarted.out
    assert {row["attempt"] for row in read_rows(run)[len(after) :]} == {4}
    shutil.rmtree(run / "checkpoints")
    lost = start(tiny, tmp_path, training__max_steps=6)
    assert lost.status == 4
    assert "no checkpoint found, but the run has saved step 4" in lost.err
    fewer = start(tiny, tmp_path, training__max_steps=3)
    assert fewer.status == 2
    assert "training.max_steps: 3, but the run in" in fewer.err


@pytest.mark.parametrize(("stage", "message"), [(0, "loss nan"), (1, "a gradient is not finite")])
def test_nonfinite_loss_or_gradient_halts_run(stage: int, message: str, tiny: dict[str, Any], tmp_path: Path) -> None:
    """At ZeRO 0 the update is applied and the loss becomes NaN; above, DeepSpeed skips the update silently."""
    ended = start(
        tiny,
        tmp_path,
        deepspeed__optimizer={"type": "SGD", "params": {"lr": 1e38}},
        deepspeed__zero_optimization={"stage": stage},
        training__log_every_steps=1,
    )
    assert ended.status == 5
    assert f"error: step 2: {message}" in ended.err
    assert "Traceback" not in ended.err
    rows = [row["loss"] for row in read_rows(tmp_path / "run") if row["split"] == "train"]
    assert rows[1:] == ([None] if stage == 0 else [])
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.fast
def test_invalid_config_json_is_not_overwritten(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        RunDirectory.examine(check_config(tiny, world_size=1, device="cpu"))
