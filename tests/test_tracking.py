"""What is logged, where, and that no tracker can hurt a run."""

from __future__ import annotations

import io
import json
import logging
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.configs import with_values
from tests.harness import run_command
from trainer.config.load import check_config
from trainer.config.schema import WandbSection
from trainer.errors import ConfigError
from trainer.run_directory import RunDirectory
from trainer.tasks import TASKS
from trainer.tracking.console import Console, describe
from trainer.tracking.jsonl import JsonLines
from trainer.tracking.wandb import Wandb

ROOT = Path(__file__).parent.parent
TRAIN, GENERATE = (str(ROOT / "launch" / f"{name}.py") for name in ("train", "generate"))
TRAIN_KEYS = [
    "step", "split", "attempt", "epoch", "tokens", "samples", "loss", "grad_norm", "learning_rate", "step_seconds",
    "tokens_per_second", "tokens_per_second_per_device", "mfu", "memory_bytes_max", "data_wait_seconds",
]  # fmt: skip


def start(tiny: dict[str, Any], folder: Path, **values: Any) -> Any:
    path = folder / "config.json"
    path.write_text(json.dumps(with_values(tiny, **values)))
    return run_command(TRAIN, "--config", str(path))


def read_rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_wandb_records(run: Path) -> list[dict[str, Any]]:
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(file)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return [json.loads(line) for line in printed.splitlines() if line.strip()]


def test_command_writes_rows_model_and_wandb_run(tiny: dict[str, Any], tmp_path: Path) -> None:
    """One process: the rows, the run directory, the offline W&B run, the model, and the same command again."""
    values = {"training__max_steps": 5, "evaluation": {"every_steps": 2}, "tracking": {"wandb": {"mode": "offline"}},
              "data__drop_last": True}  # fmt: skip
    began = time.time()
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

    about = json.loads((run / "config.json").read_text())["tessera"]
    assert about["finished_step"] == 5
    assert about["document_frame"]["suffix_tokens"] == ["<|endoftext|>"]
    assert about["versions"]["torch"]
    assert about["world"] == {"processes": 1, "data": 1, "pipeline": 1, "tensor": 1}
    assert "training reads" in (run / "logs" / "rank-0.log").read_text()

    records = read_wandb_records(run)
    text = json.dumps(records)
    assert "train/loss" in text
    stamps = [record["history"]["item"]["_timestamp"] for record in records if "history" in record]
    assert len(stamps) == len(rows)
    saved = (run / "checkpoints" / "step-00000005" / "manifest.json").stat().st_mtime
    assert began < stamps[0] <= stamps[-1] < saved + 1, "wandb keeps them; its process is busy for longer"
    assert "validation/perplexity" in text
    assert "train_micro_batch_size_per_gpu" in text, "the resolved configuration is attached"

    held_out = validation_loss_of_exported_model(run, with_values(tiny, **values), tmp_path)
    assert held_out == pytest.approx(rows[-1]["loss"], rel=1e-6), "the exported model is the live one"

    again = start(tiny, tmp_path, **values)
    assert again.status == 0
    assert "finished at step 5" in again.out
    assert read_rows(run) == rows

    other = start(tiny, tmp_path, **{**values, "run__seed": 5, "data__sequence_length": 16})
    assert other.status == 2
    assert "run.seed: 5 here, 11 in the run directory" in other.err
    assert "data.sequence_length: 16 here, 32 in the run directory" in other.err

    said = run_command(GENERATE, "--run", str(run), "--prompt", "the quick", "--tokens", "5")
    assert said.status == 0, said.err
    assert said.out.startswith("the quick")
    nothing = run_command(GENERATE, "--run", str(tmp_path), "--prompt", "x")
    assert nothing.status == 2
    assert "has neither a final model nor checkpoints" in nothing.err


def validation_loss_of_exported_model(run: Path, tiny: dict[str, Any], tmp_path: Path) -> float:
    """The held-out loss of the exported folder, computed by Hugging Face alone."""
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
    anew = start(tiny, tmp_path, training__max_steps=4, checkpoint__resume="never")
    assert "archived 2 checkpoints up to step-00000004" in anew.out
    assert {row["attempt"] for row in read_rows(run)[len(after) :]} == {4}
    shutil.rmtree(run / "checkpoints")
    lost = start(tiny, tmp_path, training__max_steps=6)
    assert lost.status == 4
    assert "no checkpoint found, but the run has saved step 4" in lost.err
    fewer = start(tiny, tmp_path, training__max_steps=3)
    assert fewer.status == 2
    assert "training.max_steps: 3, but the run in" in fewer.err


@pytest.mark.parametrize(("stage", "words"), [(0, "loss nan"), (1, "a gradient is not finite")])
def test_nonfinite_loss_or_gradient_halts_run(stage: int, words: str, tiny: dict[str, Any], tmp_path: Path) -> None:
    """At ZeRO 0 the update is made and the loss shows it; above, DeepSpeed skips the update and says nothing."""
    ended = start(
        tiny,
        tmp_path,
        deepspeed__optimizer={"type": "SGD", "params": {"lr": 1e38}},
        deepspeed__zero_optimization={"stage": stage},
        training__log_every_steps=1,
    )
    assert ended.status == 5
    assert f"error: step 2: {words}" in ended.err
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


@pytest.mark.fast
def test_jsonl_row_is_valid_json_and_flushed(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.log({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 1, "loss": None, "grad_norm": None}


@pytest.mark.fast
def test_perplexity_does_not_overflow() -> None:
    assert TASKS["causal_lm"].metrics(2.0, {})["perplexity"] == pytest.approx(math.exp(2))
    assert TASKS["causal_lm"].metrics(1e6, {})["perplexity"] == math.inf


@pytest.mark.fast
def test_console_line_shows_metrics_with_units() -> None:
    row = dict.fromkeys(TRAIN_KEYS, 0.0) | {"split": "train", "step": 3, "loss": 1.5, "grad_norm": 0.25, "mfu": 0.41,
                                            "tokens_per_second": 12_345.0, "memory_bytes_max": 2e9, "step_seconds": 2.0,
                                            "data_wait_seconds": 0.02, "learning_rate": 3e-4}  # fmt: skip
    line = describe(row, 10)
    for part in ("step 3/10", "loss 1.5000", "grad norm 0.250", "lr 3.00e-04", "12.3k tokens/s", "MFU 41.0 %",
                 "memory 2.00 GB", "data wait 1.0 %"):  # fmt: skip
        assert part in line


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.fast
@pytest.mark.parametrize("terminal", [True, False])
def test_time_left_is_computed_from_step_time(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a run that resumes at step 90,000 of 100,000, after more than a day."""
    screen = _Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(logging.getLogger("trainer"), "propagate", True)
    caplog.set_level(logging.INFO)
    console = Console(100_000)
    row = dict.fromkeys(TRAIN_KEYS, 0.0) | {"split": "train", "step": 90_010, "step_seconds": 9.5, "mfu": None}
    console.log(row)
    if console._progress is not None:
        (task,) = console._progress.tasks
        task.start_time = console._progress.get_time() - 100_000.4
        console._progress.refresh()
    console.close(0)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue()) if terminal else caplog.text
    assert "left 26:21:45" in shown
    if terminal:
        assert re.search(r"90010/100000 27:46:40 left 26:21:45", shown), shown


class _Slow:
    """A `wandb` whose init takes a moment; keeps what is logged."""

    Settings = dict
    rows: ClassVar[list[dict[str, Any]]] = []

    @classmethod
    def init(cls, **_: Any) -> Any:
        time.sleep(0.5)
        return cls

    @classmethod
    def log(cls, row: dict[str, Any]) -> None:
        cls.rows.append(row)

    @staticmethod
    def define_metric(*_: Any, **__: Any) -> None: ...

    @staticmethod
    def finish(**_: Any) -> None: ...


@pytest.mark.fast
def test_wandb_row_has_time_of_log_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not that at which the thread got to it."""
    monkeypatch.setitem(sys.modules, "wandb", _Slow)
    _Slow.rows.clear()
    tracker = Wandb(WandbSection(mode="offline"), name="n", folder=tmp_path, config={})
    times = []
    for step in (1, 2):
        times.append(time.time())
        tracker.log({"step": step, "split": "train", "loss": 1.0})
        time.sleep(0.1)
    tracker.close(0)
    assert [row["_timestamp"] for row in _Slow.rows] == pytest.approx(times, abs=0.05)
    assert [row["train/loss"] for row in _Slow.rows] == [1.0, 1.0]


class _Hangs:
    """A `wandb` whose init never comes back."""

    Settings = dict

    @staticmethod
    def init(**_: Any) -> None:
        time.sleep(3600)


class _Fails:
    Settings = dict

    @staticmethod
    def init(**_: Any) -> None:
        raise OSError("no space left on device")


@pytest.mark.fast
def test_wandb_never_blocks_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("trainer.tracking.wandb._CLOSE_SECONDS", {"online": 0.5})
    monkeypatch.setattr(logging.getLogger("trainer"), "propagate", True)
    for module, words in ((_Hangs, "did not finish within"), (_Fails, "no space left on device")):
        monkeypatch.setitem(sys.modules, "wandb", module)
        began = time.monotonic()
        tracker = Wandb(WandbSection(mode="online"), name="n", folder=tmp_path, config={})
        for step in range(1000):
            tracker.log({"step": step, "split": "train", "loss": 1.0})
        assert time.monotonic() - began < 0.5
        tracker.close(0)
        assert time.monotonic() - began < 3
        assert words in caplog.text
        assert "metrics.jsonl is complete" in caplog.text
