"""`--dry_run` checks the data, the weights, the checkpoint and the device, and estimates the amount of data."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.numpy import save

from tests.bad_inputs import SOUND_LINE, folder
from tests.configs import with_values
from tests.harness import CommandResult, run_command
from trainer.config.load import check_config
from trainer.data import prepare_data, resolve_steps
from trainer.data.inspection import inspect_data
from trainer.data.source_sample import MAX_INSPECTED_ROWS
from trainer.data.tokenizer import train_tokenizer
from trainer.dry_run import describe

TRAIN = str(Path(__file__).parent.parent / "launch" / "train.py")

pytestmark = pytest.mark.fast


@pytest.fixture
def fresh(tiny: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Return a configuration whose data are not in the cache."""
    return with_values(tiny, data__cache_dir=str(tmp_path / "cache"))


def dry_run(config: dict[str, Any], target: Path, *arguments: str) -> CommandResult:
    (target / "config.json").write_text(json.dumps(config))
    return run_command(TRAIN, "--config", str(target / "config.json"), "--dry_run", *arguments)


def refusal(status: int, words: str, ended: CommandResult) -> None:
    assert ended.status == status, ended.out + ended.err
    assert words in ended.err
    assert "Traceback" not in ended.err
    assert "sound" not in ended.out


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", SOUND_LINE + b'{"body": "x"}\n', "a.jsonl: line 2: no field 'text', only 'body'"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "hi"}]}\n', "line 1: no field 'text', only 'messages'"),
        ("a.jsonl", b"", "a.jsonl: contains no text"),
        ("a.jsonl", b'{"text": ""}\n', "a.jsonl: contains no text"),
        ("a.json", b'{"text": 3}', "a.json: line 1: field 'text' holds int"),
        ("a.jsonl.gz", gzip.compress(SOUND_LINE)[:-9], "a.jsonl.gz: line 1: cannot be decompressed"),
        ("a.parquet", b"PAR1 and nothing", "a.parquet"),
    ],
)
def test_dry_run_reports_invalid_rows(
    name: str, content: bytes, words: str, fresh: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    refusal(3, words, dry_run(with_values(fresh, data__train=[{"path": str(tmp_path / name)}]), tmp_path))
    assert not (tmp_path / "cache").exists(), "nothing was prepared"


@pytest.mark.parametrize(("free", "warns"), [(1000, True), (10**12, False)])
def test_dry_run_warns_of_full_disk(
    free: int, warns: bool, fresh: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: seen.append(path) or SimpleNamespace(free=free))
    config = with_values(fresh, run__output_dir=str(tmp_path / "runs" / "later"))
    text = describe(check_config(config, world_size=1, device=None))
    assert ("warning: run.output_dir: 0.00 MB free in " in text) == warns
    assert seen == [tmp_path], "the run directory is not there yet"


def test_control_characters_in_names_are_escaped(fresh: dict[str, Any], tmp_path: Path) -> None:
    name = "a\x1b[31m.jsonl"
    (tmp_path / name).write_bytes(SOUND_LINE)
    ended = dry_run(with_values(fresh, data__train=[{"path": str(tmp_path / name)}]), tmp_path)
    assert ended.status == 0, ended.err
    assert r"a\x1b[31m.jsonl" in ended.out
    assert "\x1b" not in ended.out


def test_dry_run_inspects_every_file(fresh: dict[str, Any], tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number:02}.jsonl").write_bytes(SOUND_LINE * 3 if number != 29 else b'{"body": ""}\n')
    refusal(
        3, "29.jsonl: line 1: no field", dry_run(with_values(fresh, data__train=[{"path": str(tmp_path)}]), tmp_path)
    )
    (tmp_path / "29.jsonl").write_bytes(b"")
    ended = dry_run(with_values(fresh, data__train=[{"path": str(tmp_path)}]), tmp_path)
    assert ended.status == 0, ended.err
    assert "warning: data.train.0: 1 files contain no text: " in ended.out


def test_dry_run_reports_truncated_weights(fresh: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    import numpy as np

    for name, content in folder({"model.norm.weight": np.ones(32, np.float32)}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    train_tokenizer((json.loads(line)["text"] for line in (corpus / "train.jsonl").open()), 320, tmp_path / "model")
    config = with_values(fresh, model={"path": str(tmp_path / "model")})
    assert dry_run(config, tmp_path).status == 0
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(save({"model.norm.weight": np.ones(32, np.float32)}, metadata={"format": "pt"})[:-8])
    refusal(2, "model.path", dry_run(config, tmp_path))


def test_dry_run_reports_unsupported_fp16(fresh: dict[str, Any], tmp_path: Path) -> None:
    """Warn only, because the machine that trains may have GPUs."""
    half = with_values(fresh, deepspeed__fp16={"enabled": True}, deepspeed__zero_optimization={"stage": 1})
    ended = dry_run(half, tmp_path)
    assert ended.status == 0, ended.err
    assert "the configuration is valid, but not on this machine" in ended.out
    assert "warning: refused on this machine: deepspeed.fp16.enabled: DeepSpeed does not support fp16" in ended.out
    assert "not on this machine" not in dry_run(fresh, tmp_path).out


def test_dry_run_inspects_checkpoint_to_resume_from(fresh: dict[str, Any], tmp_path: Path) -> None:
    refusal(4, "nowhere does not exist", dry_run(fresh, tmp_path, "--resume", str(tmp_path / "nowhere")))
    run = tmp_path / "run"
    (tmp_path / "config.json").write_text(json.dumps(fresh))
    assert run_command(TRAIN, "--config", str(tmp_path / "config.json")).status == 0
    assert "finished     at step 4" in dry_run(fresh, tmp_path).out
    more = with_values(fresh, training__max_steps=6)
    assert "resume       from step 4" in dry_run(more, tmp_path).out
    other = with_values(more, run__output_dir=str(tmp_path / "other"))
    assert "resume       from step 4" in dry_run(other, tmp_path, "--resume", str(run)).out
    assert "resume " not in dry_run(other, tmp_path).out
    refusal(2, "run.seed: 5 here, 11 in", dry_run(with_values(more, run__seed=5), tmp_path))
    fewer = with_values(other, training__max_steps=2)
    refusal(2, "training.max_steps: 2, and", dry_run(fewer, tmp_path, "--resume", str(run)))
    shard = run / "checkpoints" / "step-00000004" / "rank-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    refusal(4, "rank-00000.safetensors", dry_run(more, tmp_path))
    refusal(4, "rank-00000.safetensors", dry_run(other, tmp_path, "--resume", str(run)))


def texts(corpus: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (corpus / "train.jsonl").open()] * 8


def as_jsonl(target: Path, rows: list[str]) -> str:
    (target / "a.jsonl").write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in rows))
    return str(target / "a.jsonl")


def as_gzip(target: Path, rows: list[str]) -> str:
    as_jsonl(target, rows)
    (target / "a.jsonl.gz").write_bytes(gzip.compress((target / "a.jsonl").read_bytes()))
    return str(target / "a.jsonl.gz")


def as_array(target: Path, rows: list[str]) -> str:
    (target / "a.json").write_text(json.dumps([{"text": text, "n": 1} for text in rows]))
    return str(target / "a.json")


def as_parquet(target: Path, rows: list[str]) -> str:
    import datasets

    datasets.Dataset.from_dict({"text": rows}).to_parquet(str(target / "a.parquet"))
    return str(target / "a.parquet")


@pytest.mark.parametrize("write", [as_jsonl, as_gzip, as_array, as_parquet])
@pytest.mark.parametrize("fraction", [None, 0.25])
def test_sample_estimates_are_near_exact_counts(
    write: Callable[[Path, list[str]], str], fraction: float | None, fresh: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
    """Estimate documents and tokens from the first rows; report exact numbers once the data are prepared."""
    folder_of_tokenizer, rows = tmp_path / "tokenizer", texts(corpus)
    train_tokenizer(iter(rows), 320, folder_of_tokenizer)
    path = write(tmp_path, rows)
    config = with_values(
        fresh,
        data__train=[{"path": path}],
        data__tokenizer=str(folder_of_tokenizer),
        data__validation=[{"fraction": fraction}] if fraction else [],
        training={"epochs": 2},
    )
    loaded = check_config(config, world_size=1, device="cpu")
    estimated = inspect_data(loaded)
    assert len(rows) > 10 * MAX_INSPECTED_ROWS
    assert not estimated.is_exact
    prepared = prepare_data(loaded)
    exact = inspect_data(loaded)
    assert exact.is_exact
    assert exact.sources[0].documents == len(prepared.train[0])
    assert exact.sources[0].tokens == prepared.train[0].tokens
    for guess, count in zip(estimated.sources, exact.sources, strict=True):
        assert guess.key == count.key
        assert guess.documents == pytest.approx(count.documents, rel=0.35)
        assert guess.tokens == pytest.approx(count.tokens, rel=0.35)
    steps = resolve_steps(loaded, prepared).steps
    said = dry_run(config, tmp_path).out
    assert f"{count_of(exact)} samples" in said
    assert f"epochs       {steps:,} steps read" in said
    assert "about" not in re.findall(r"epochs       .*", said)[0]


def count_of(report: object) -> str:
    return f"{report.epoch_samples:,}"
