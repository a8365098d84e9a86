"""Samples of token files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.data_helpers import COLLATE, write_tokens
from trainer.errors import DataError
from trainer.tasks import IGNORE_INDEX
from trainer.tasks.samples import ConcatenatedSamples, DocumentSamples

pytestmark = pytest.mark.fast


def test_concatenated_samples_overlap_by_one_id(tmp_path: Path) -> None:
    samples = ConcatenatedSamples(write_tokens(tmp_path / "t", [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9]]), 3)
    assert len(samples) == 3
    assert [samples.ids(i).tolist() for i in range(3)] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert samples.count_targets(np.arange(3)) == 9


@pytest.mark.parametrize("tokens", [2, 3, 4, 5, 6, 7, 8, 100])
@pytest.mark.parametrize("drop_last", [False, True])
def test_concatenated_samples_predict_every_token_once(tokens: int, drop_last: bool, tmp_path: Path) -> None:
    written = write_tokens(tmp_path / "t", [list(range(tokens))])
    if drop_last and tokens < 4:
        with pytest.raises(DataError, match="fewer than one sample"):
            ConcatenatedSamples(written, 3, drop_last=True)
        return
    samples = ConcatenatedSamples(written, 3, drop_last=drop_last)
    labels = [label for n in range(len(samples)) for label in samples.ids(n)[1:].tolist()]
    assert labels == list(range(1, 1 + 3 * len(samples) if drop_last else tokens))
    assert tokens - 1 - len(labels) < (3 if drop_last else 1)
    for chosen in (np.arange(len(samples)), np.array([len(samples) - 1] * 2), np.array([0])):
        assert samples.count_targets(chosen) == sum(len(samples.ids(n)) - 1 for n in chosen)


@pytest.mark.parametrize("samples", [1, 2, 5])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_number_of_concatenated_samples_at_boundaries(samples: int, extra: int, tmp_path: Path) -> None:
    """With `k * length` tokens the k-th sample is one token short; `k * length + 1` tokens fill k samples exactly."""
    length = 4
    tokens = write_tokens(tmp_path / "t", [list(range(samples * length + extra))])
    concatenated = ConcatenatedSamples(tokens, length)
    assert len(concatenated) == samples
    sizes = [len(concatenated.ids(n)) for n in range(samples)]
    assert sizes == [length + 1] * (samples - 1) + [length + extra]
    assert concatenated.count_targets(np.array([samples - 1])) == length + extra - 1
    if samples > 1 or extra == 1:
        assert len(ConcatenatedSamples(tokens, length, drop_last=True)) == samples - (extra < 1)


def test_single_token_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 tokens, and a sample has 2 at least"):
        ConcatenatedSamples(write_tokens(tmp_path / "t", [[5]]), 3)


def test_document_samples_are_truncated_and_padded(tmp_path: Path) -> None:
    samples = DocumentSamples(write_tokens(tmp_path / "t", [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]), 4)
    assert [samples.ids(i).tolist() for i in range(len(samples))] == [[1, 2, 3], [5, 6, 7, 8, 9]]
    assert samples.count_targets(np.arange(2)) == 6
    assert samples.num_truncated == 1
    batch = COLLATE([samples.ids(i).astype(np.int64) for i in range(2)])
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 0, 0], [5, 6, 7, 8]]
    assert batch.labels.tolist() == [[2, 3, IGNORE_INDEX, IGNORE_INDEX], [6, 7, 8, 9]]
    assert batch.num_targets == 6
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
