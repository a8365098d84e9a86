"""`{"fraction": F}` in data.validation: the documents that are held out are not trained on."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from tests.configs import with_values
from tests.harness import CommandResult, run_command
from trainer.config.load import check_config
from trainer.data import PreparedData, open_batches, prepare_data, resolve_steps
from trainer.data.holdout import DocumentSubset, drop_held_out, held_out_mask
from trainer.data.indexed import IndexedTokens, IndexedWriter
from trainer.data.sources import TextChunk
from trainer.topology import Topology

TRAIN = str(Path(__file__).parent.parent / "launch" / "train.py")
FRACTION = 0.2

fast = pytest.mark.fast


def belongs_to_validation(text: str) -> bool:
    """Apply the documented rule."""
    return xxhash.xxh3_64(text.encode()).intdigest() / 2**64 < FRACTION


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def write_texts(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def held_out_config(tiny: dict[str, Any]) -> dict[str, Any]:
    return with_values(tiny, data__validation=[{"fraction": FRACTION}])


def prepared(config: dict[str, Any]) -> PreparedData:
    return prepare_data(check_config(config, world_size=1, device="cpu"))


def decoded(data: PreparedData, files: list[IndexedTokens]) -> Counter[str]:
    assert data.tokenizer is not None
    documents = [tokens.document(number) for tokens in files for number in range(len(tokens))]
    return Counter(data.tokenizer.decode(ids[:-1]) for ids in documents)  # without the end-of-text token


@fast
def test_documents_are_split_by_text_hash(held_out_config: dict[str, Any], corpus: Path) -> None:
    """Compared with the documented rule: no document is lost, and none is on both sides."""
    data = prepared(held_out_config)
    texts = texts_of(corpus / "train.jsonl")
    held_out = Counter(text for text in texts if belongs_to_validation(text))
    assert decoded(data, data.validation) == held_out
    assert decoded(data, data.train) == Counter(texts) - held_out
    assert 0.12 < held_out.total() / len(texts) < 0.28


@fast
def test_split_ignores_order_files_and_duplicates(
    held_out_config: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
    """Shuffled, in two sources, and twice each: the same documents are held out."""
    texts = texts_of(corpus / "train.jsonl")
    first = prepared(held_out_config)
    shuffled = [*texts, *texts]
    random.Random(1).shuffle(shuffled)
    parts = [write_texts(tmp_path / f"{n}.jsonl", part) for n, part in enumerate((shuffled[:300], shuffled[300:]))]
    twice = prepared(with_values(held_out_config, data__train=[{"path": part} for part in parts]))
    for side in ("train", "validation"):
        once, both = decoded(first, getattr(first, side)), decoded(twice, getattr(twice, side))
        assert both == once + once
    assert twice.validation_files == (2,), "one source, of two files"
    assert len(twice.weights) == len(twice.train) == 2


@fast
def test_token_files_are_split_by_id_hash(held_out_config: dict[str, Any], tmp_path: Path) -> None:
    """For any id type; duplicates in another file are on the same side."""
    draw = np.random.default_rng(3)
    documents = [draw.integers(0, 300, size=draw.integers(1, 90)).tolist() for _ in range(200)]
    for name, dtype, order in (("a", np.uint16, documents), ("b", np.int32, documents[::-1])):
        with IndexedWriter(tmp_path / name, dtype) as writer:
            for ids in order:
                writer.add(ids)
    sources = [{"path": str(tmp_path / f"{name}.bin"), "weight": weight} for name, weight in (("a", 1), ("b", 0.5))]
    data = prepared(with_values(held_out_config, data__train=sources))
    train_a, train_b, held_out_a, held_out_b = (
        {tuple(tokens.document(n).tolist()) for n in range(len(tokens))} for tokens in (*data.train, *data.validation)
    )
    assert train_a == train_b
    assert held_out_a == held_out_b
    assert not train_a & held_out_a
    assert train_a | held_out_a == set(map(tuple, documents))
    assert data.weights == (1.0, 0.5)
    again = prepared(with_values(held_out_config, data__train=sources))
    assert [t.fingerprint() for t in again.train] == [t.fingerprint() for t in data.train]
    other = prepared(with_values(held_out_config, data__train=sources, data__validation=[{"fraction": 0.3}]))
    assert [t.fingerprint() for t in other.train] != [t.fingerprint() for t in data.train]


@fast
def test_subset_stream_concatenates_documents(tmp_path: Path) -> None:
    draw = np.random.default_rng(5)
    documents = [draw.integers(0, 999, size=draw.integers(0, 12)).tolist() for _ in range(60)]
    with IndexedWriter(tmp_path / "t", np.uint16) as writer:
        for ids in documents:
            writer.add(ids)
    tokens = IndexedTokens(tmp_path / "t")
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        mask = draw.random(60) < share
        subset = DocumentSubset(tokens, mask)
        joined = [i for ids, is_selected in zip(documents, mask, strict=True) if is_selected for i in ids]
        assert subset.tokens == len(joined)
        assert len(subset) == mask.sum()
        for start in range(len(joined)):
            for length in (1, 7, 500):
                assert subset.stream(start, length).tolist() == joined[start : start + length]


@fast
def test_subset_stream_of_adjacent_documents_is_not_copied(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "t", np.uint16) as writer:
        for number in range(5):
            writer.add([number] * 3)
    tokens = IndexedTokens(tmp_path / "t")
    subset = DocumentSubset(tokens, np.asarray([False, True, True, False, True]))
    assert np.shares_memory(subset.stream(0, 6), tokens.ids)
    assert not np.shares_memory(subset.stream(0, 9), tokens.ids)


@fast
def test_fraction_is_a_share_of_hash_space() -> None:
    hashes = np.asarray([0, 2**62 - 1, 2**62, 2**63, 2**64 - 1], np.uint64)
    assert held_out_mask(hashes, 0.25).tolist() == [True, True, False, False, False]
    assert held_out_mask(hashes, 0.9999999999).tolist() == [True, True, True, True, False]


@fast
def test_tokenizer_training_skips_held_out_text() -> None:
    """Documents in several chunks are hashed as one; longer ones than the limit are truncated after hashing."""
    texts = [f"document {number} " * (number % 4 + 1) for number in range(60)]
    chunks = [chunk for text in texts for chunk in (TextChunk(text[:6], False, 6), TextChunk(text[6:], True, 9))]
    kept = "".join(chunk.text for chunk in drop_held_out(iter(chunks), FRACTION, 100))
    assert kept == "".join(text for text in texts if not belongs_to_validation(text))
    assert 0 < len(kept) < len("".join(texts))
    cut = "".join(chunk.text for chunk in drop_held_out(iter(chunks), FRACTION, 3))
    assert cut == "".join(text[:6] for text in texts if not belongs_to_validation(text))


@fast
def test_epochs_count_remaining_samples(held_out_config: dict[str, Any]) -> None:
    """An epoch reads exactly the documents that are not held out."""
    config = with_values(held_out_config, training={"epochs": 1}, data__packing="none")
    loaded = check_config(config, world_size=1, device="cpu")
    data = prepare_data(loaded)
    loaded = resolve_steps(loaded, data)
    assert loaded.steps == -(-len(data.train[0]) // 8)
    train = open_batches(loaded, data, Topology.of(1, 0)).train
    micros = [micro for step in range(1, loaded.steps + 1) for micro in train.batch_at(step).micro_batches]
    read = {
        (int(ids[0]), *labels[labels >= 0].tolist())
        for micro in micros
        for ids, labels in zip(micro.inputs["input_ids"], micro.labels, strict=True)
    }
    train_documents, held_out_documents = (
        {tuple(tokens.document(n, 33).tolist()) for tokens in files for n in range(len(tokens))}
        for files in (data.train, data.validation)
    )
    assert read == train_documents
    assert not read & held_out_documents


def start(config: dict[str, Any], folder: Path, *arguments: str, world: int = 1) -> CommandResult:
    (folder / "config.json").write_text(json.dumps(config))
    return run_command(TRAIN, "--config", str(folder / "config.json"), *arguments, world=world)


def losses(run: Path) -> list[tuple[str, int, float]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(row["split"], row["step"], row["loss"]) for row in rows]


def test_run_trains_without_held_out_documents(held_out_config: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    """On two ranks it equals, bit for bit, the run on two files split by the rule; another fraction is refused."""
    texts = texts_of(corpus / "train.jsonl")
    train_texts = [text for text in texts if not belongs_to_validation(text)]
    validation_texts = [text for text in texts if belongs_to_validation(text)]
    by_hand = with_values(
        held_out_config,
        run__output_dir=str(tmp_path / "by-hand"),
        data__train=[{"path": write_texts(tmp_path / "t.jsonl", train_texts)}],
        data__validation=[{"path": write_texts(tmp_path / "v.jsonl", validation_texts)}],
    )
    for config in (held_out_config, by_hand):
        ended = start(config, tmp_path, world=2)
        assert ended.status == 0, ended.err
    assert losses(tmp_path / "run") == losses(tmp_path / "by-hand")
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["data"]["validation"] == [{"fraction": FRACTION, "weight": 1.0}]
    stored = json.loads((tmp_path / "by-hand" / "config.json").read_text())
    assert stored["data"]["validation"] == [{"path": str(tmp_path / "v.jsonl"), "weight": 1.0}], (
        "as in runs without a fraction"
    )
    refused = start(with_values(held_out_config, data__validation=[{"fraction": 0.3}]), tmp_path)
    assert refused.status == 2
    assert "data.validation: " in refused.err
