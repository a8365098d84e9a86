"""Estimated sizes of data that has not been tokenized or split yet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.configs import LENGTH, with_values
from tests.data_helpers import write_tokens
from trainer.config.load import check_config
from trainer.data.inspection import DataReport, inspect_data

pytestmark = pytest.mark.fast


def report_of(config: dict[str, Any], tmp_path: Path, **values: object) -> DataReport:
    """Inspect the data of a configuration with an empty cache."""
    changed = with_values(config, data__cache_dir=str(tmp_path / "cache"), **values)
    return inspect_data(check_config(changed, world_size=1, device="cpu"))


def test_held_out_share_of_token_files_is_estimated(tiny: dict[str, Any], tmp_path: Path) -> None:
    write_tokens(tmp_path / "t", [[1] * (LENGTH + 1)] * 100)
    train = [{"path": str(tmp_path / "t.bin")}]
    report = report_of(tiny, tmp_path, data__train=train, data__validation=[{"fraction": 0.2}])
    sizes = [(source.documents, source.tokens, source.is_exact, source.basis) for source in report.sources]
    assert sizes == [
        (80, 80 * (LENGTH + 1), False, "estimated"),
        (20, 20 * (LENGTH + 1), False, "estimated"),
    ]
    assert not report.is_exact
    assert report.epoch_samples == (80 * (LENGTH + 1) - 1) // LENGTH + 1


def test_token_files_are_counted(tiny: dict[str, Any], tmp_path: Path) -> None:
    write_tokens(tmp_path / "t", [[1] * 50] * 7)
    report = report_of(tiny, tmp_path, data__train=[{"path": str(tmp_path / "t.bin")}], data__validation=[])
    (source,) = report.sources
    assert (source.documents, source.tokens, source.is_exact, source.basis) == (7, 350, True, "counted")
    assert report.is_exact


def test_untokenized_text_is_estimated_from_its_first_rows(tiny: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "seven wizards brew potions"}) + "\n")
    path.write_text(path.read_text() * 1000)
    report = report_of(tiny, tmp_path, data__train=[{"path": str(path), "weight": 2.0}], data__validation=[])
    (source,) = report.sources
    assert source.documents is not None
    assert source.tokens is not None
    assert abs(source.documents - 1000) <= 10
    assert source.tokens > 3 * source.documents
    assert not source.is_exact
    assert source.basis == "estimated from up to 100 rows of 1 of 1 files"
    assert report.epoch_samples == round(2.0 * ((source.tokens - 1) // LENGTH + 1))
