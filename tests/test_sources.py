"""Sources of text: formats, splits, hub datasets."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.data_helpers import prepared
from tests.hub import COMMIT, REPOSITORY, hub
from trainer.data import sources
from trainer.data.sources import Source, stdlib_files
from trainer.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

pytestmark = pytest.mark.fast

TEXTS = ["seven wizards", "brew\npotions", "of quartz \u00e9\u4e2d"]


def as_jsonl(folder: Path) -> str:
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n\n" for t in TEXTS), encoding="utf-8")
    return str(folder / "a.jsonl")


def as_txt(folder: Path) -> str:
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return str(folder / "*.txt")


def _dataset() -> Dataset:
    import datasets

    return datasets.Dataset.from_dict({"text": TEXTS, "n": [1, 2, 3]})


def as_parquet(folder: Path) -> str:
    _dataset().to_parquet(str(folder / "a.parquet"))
    return str(folder)


def as_csv(folder: Path) -> str:
    _dataset().to_csv(str(folder / "a.csv"), index=False)
    return str(folder / "a.csv")


def as_arrow(folder: Path) -> str:
    _dataset().save_to_disk(str(folder / "saved"))
    return str(next((folder / "saved").glob("*.arrow")))


def as_saved(folder: Path) -> str:
    _dataset().save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


def as_saved_splits(folder: Path) -> str:
    import datasets

    datasets.DatasetDict({"train": _dataset(), "validation": _dataset().select([0])}).save_to_disk(str(folder / "both"))
    return str(folder / "both")


@pytest.mark.parametrize("write", [as_jsonl, as_txt, as_parquet, as_csv, as_arrow, as_saved, as_saved_splits])
def test_source_formats_yield_same_documents(write: Callable[[Path], str], tmp_path: Path) -> None:
    source = Source(write(tmp_path), "train", "text")
    documents, current = [], ""
    for chunk in source.chunks():
        current += chunk.text
        if chunk.is_last:
            documents.append(current)
            current = ""
    assert documents == TEXTS


def test_overwritten_dataset_changes_signature(tmp_path: Path) -> None:
    import datasets

    source = Source(as_saved(tmp_path), "train", "text")
    before = source.signature(), source.content_hash()
    datasets.Dataset.from_dict({"text": ["other"], "n": [1]}).save_to_disk(str(tmp_path / "again"))
    for file in (tmp_path / "again").iterdir():
        (tmp_path / "saved" / file.name).write_bytes(file.read_bytes())
    assert source.signature() != before[0]
    assert source.content_hash() != before[1]


def test_saved_dataset_folder_holds_both_splits(tiny: dict[str, Any], tmp_path: Path) -> None:
    both = [{"path": as_saved_splits(tmp_path)}]
    data = prepared(tiny, data__train=both, data__validation=both, data__packing="none")
    assert (len(data.train[0]), len(data.validation[0])) == (3, 1)


def test_long_text_file_is_read_in_chunks(tmp_path: Path) -> None:
    text = "".join(f"line {n}\n" for n in range(300_000))
    (tmp_path / "long.txt").write_text(text)
    chunks = list(Source(str(tmp_path / "long.txt"), "train", "text").chunks())
    assert len(chunks) > 2
    assert "".join(p.text for p in chunks) == text
    assert [p.is_last for p in chunks] == [False] * (len(chunks) - 1) + [True]


@pytest.mark.parametrize(("texts", "warnings"), [(["a", "", "b", ""], ["skipped 2 empty documents of 4"]), (["a"], [])])
def test_empty_documents_are_skipped_with_a_warning(
    texts: list[str], warnings: list[str], tiny: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train = [{"path": str(path)}]
    with caplog.at_level(logging.WARNING):
        data = prepared(tiny, data__train=train, data__validation=[], data__cache_dir=str(tmp_path / "cache"))
    assert len(data.train[0]) == sum(map(bool, texts))
    assert [record.getMessage() for record in caplog.records] == [f"{path}: {warning}" for warning in warnings]


def test_stdlib_splits_are_disjoint() -> None:
    train, held_out = stdlib_files("train"), stdlib_files("validation")
    assert len(train) > 100
    assert len(held_out) > 10
    assert not set(train) & set(held_out)


def test_hub_row_without_text_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "one"}, {"body": "two"}]
    monkeypatch.setattr(sources, "_load_hub_dataset", lambda path, split: rows)
    chunks = Source("hf://owner/name", "train", "text").chunks()
    assert next(chunks).text == "one"
    with pytest.raises(DataError, match="hf://owner/name: row 2: no field 'text', only 'body'"):
        next(chunks)


def test_hub_dataset_streams_both_splits(tmp_path: Path) -> None:
    """From a hub server on the loopback address, in a child process with HF_ENDPOINT set to it."""
    script = (
        "from trainer.distributed import prepare_environment; prepare_environment()\n"
        "import json\n"
        "from trainer.data.sources import Source\n"
        f"source = {{s: Source('hf://{REPOSITORY}', s, 'text') for s in ('train', 'validation')}}\n"
        "print(json.dumps([[p.text for p in s.chunks()] for s in source.values()]))\n"
        "hashes = [s.content_hash() for s in source.values()]\n"
        "print(source['train'].signature()[0][-1], hashes[0] != hashes[1])\n"
    )
    with hub() as address:
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        ended = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
    assert ended.returncode == 0, ended.stderr
    texts, about = ended.stdout.strip().splitlines()[-2:]
    assert json.loads(texts) == [["once upon a time", "the end"], ["held out"]]
    assert about == f"{COMMIT} True"
