"""Order, token files, sources, cache, samples and batches."""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.configs import LENGTH, with_values
from tests.hub import COMMIT, REPOSITORY, hub
from tests.small_tokenizers import KINDS, framed_by, make, save
from trainer.config.earlier_versions import StoredRun, stored_run
from trainer.config.load import check_config
from trainer.data import DocumentFrame, document_frame, open_batches, prepare_data, resolve_frame, resolve_prompt_prefix
from trainer.data.batches import (
    BatchShape,
    EvaluationBatches,
    TrainBatches,
    allocate_evaluation_samples,
)
from trainer.data.indexed import IndexedTokens, IndexedWriter
from trainer.data.order import SampleOrder, permute
from trainer.data.samples import CheckedSamples
from trainer.data.sources import Source, stdlib_files
from trainer.data.tokenizer import tokenizer_hash
from trainer.errors import ConfigError, DataError
from trainer.tasks import IGNORE_INDEX, TASKS, Collation
from trainer.tasks.samples import ConcatenatedSamples, DocumentSamples
from trainer.topology import Topology

pytestmark = pytest.mark.fast


# --- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_permute_is_a_permutation(size: int) -> None:
    images = permute(np.arange(size), size, 5, 0)
    assert sorted(images) == list(range(size))


def test_permute_differs_by_key_and_looks_random() -> None:
    first, second = permute(np.arange(5000), 5000, 5, 0), permute(np.arange(5000), 5000, 5, 1)
    assert (first == second).mean() < 0.005
    assert (first == np.arange(5000)).mean() < 0.005
    # Neighbours must not stay neighbours, and both halves must be mixed.
    assert abs(np.corrcoef(np.arange(5000), first)[0, 1]) < 0.06
    assert abs((first[:2500] < 2500).mean() - 0.5) < 0.04


def test_order_reads_each_sample_once_per_epoch_reshuffled() -> None:
    order = SampleOrder((100, 37), (1.0, 1.0), seed=3)
    epochs = []
    for epoch in range(3):
        source, sample = order.lookup(np.arange(epoch * 137, (epoch + 1) * 137))
        pairs = list(zip(source.tolist(), sample.tolist(), strict=True))
        assert sorted(pairs) == sorted([(0, i) for i in range(100)] + [(1, i) for i in range(37)])
        epochs.append(pairs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_source_weights_scale_samples_per_epoch() -> None:
    order = SampleOrder((100, 10, 100), (1.0, 2.0, 0.5), seed=3)
    assert order.shares == (100, 20, 50)
    read: list[list[int]] = []
    for epoch in range(2):
        source, sample = order.lookup(np.arange(epoch * 170, (epoch + 1) * 170))
        assert sorted(sample[source == 1].tolist()) == sorted([*range(10), *range(10)])
        read.append(sample[source == 2].tolist())
    assert sorted(read[0] + read[1]) == list(range(100)), "half an epoch each, and nothing twice"


def test_order_matches_pinned_values() -> None:
    """A begun run must find the samples where it left them: pinned by value."""
    source, sample = SampleOrder((100, 37), (1.0, 0.5), 3).lookup(np.arange(64))
    positions_of_second_source = [1, 13, 16, 32, 34, 45, 49, 51, 52, 55, 57]
    assert np.flatnonzero(source).tolist() == positions_of_second_source
    assert sample.tolist() == [
        89, 5, 35, 63, 80, 67, 78, 17, 50, 32, 64, 84, 46, 1, 75, 70, 25, 88, 41, 37, 23, 4, 66, 95, 8, 99, 6, 79, 26,
        77, 92, 15, 26, 59, 20, 29, 2, 9, 11, 54, 86, 31, 24, 69, 18, 16, 39, 14, 61, 8, 43, 21, 27, 51, 68, 6, 96, 28,
        87, 22, 44, 20, 21, 98,
    ]  # fmt: skip


def test_order_lookup_takes_constant_time() -> None:
    order = SampleOrder((10**9, 10**7), (1.0, 3.0), seed=1)
    order.lookup(np.arange(1000))

    def cost(start: int) -> float:
        best = float("inf")
        for _ in range(5):
            begin = time.process_time()
            order.lookup(np.arange(start, start + 1000))
            best = min(best, time.process_time() - begin)
        return best

    assert cost(10**12) < 3 * cost(0) + 0.002


# --- token files -----------------------------------------------------------------------------------------------------


def write_tokens(prefix: Path, documents: list[list[int]], dtype: Any = np.uint16) -> IndexedTokens:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add(document)
    return IndexedTokens(prefix)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_token_files_round_trip(dtype: Any, tmp_path: Path) -> None:
    documents = [[1, 2, 3], [4], [], [5, 6]]
    tokens = write_tokens(tmp_path / "t", documents, dtype)
    assert [tokens.document(i).tolist() for i in range(4)] == documents
    assert tokens.stream(2, 3).tolist() == [3, 4, 5]
    assert tokens.tokens == 6
    assert tokens.is_contiguous
    assert tokens.document(0, limit=2).tolist() == [1, 2]


def test_index_matches_megatron_layout(tmp_path: Path) -> None:
    """Against the layout as Megatron-LM documents it, written out by hand."""
    write_tokens(tmp_path / "t", [[7, 8], [9]])
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 3)
    expected += struct.pack("<2i", 2, 1) + struct.pack("<2q", 0, 4) + struct.pack("<3q", 0, 1, 2)
    assert (tmp_path / "t.idx").read_bytes() == expected
    assert (tmp_path / "t.bin").read_bytes() == struct.pack("<3H", 7, 8, 9)


@pytest.mark.parametrize("cut", range(0, 80, 5))
def test_truncated_token_files_raise(cut: int, tmp_path: Path) -> None:
    write_tokens(tmp_path / "t", [[7, 8], [9]])
    for name in ("t.idx", "t.bin"):
        whole = (tmp_path / name).read_bytes()
        if cut < len(whole):
            (tmp_path / name).write_bytes(whole[:cut])
            with pytest.raises(DataError, match="t\\."):
                IndexedTokens(tmp_path / "t")
            (tmp_path / name).write_bytes(whole)


# --- sources ---------------------------------------------------------------------------------------------------------

TEXTS = ["seven wizards", "brew\npotions", "of quartz \u00e9\u4e2d"]


def as_jsonl(folder: Path) -> str:
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n\n" for t in TEXTS), encoding="utf-8")
    return str(folder / "a.jsonl")


def as_txt(folder: Path) -> str:
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return str(folder / "*.txt")


def _dataset() -> Any:
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
def test_source_formats_yield_same_documents(write: Any, tmp_path: Path) -> None:
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
    prepared_data = prepared(tiny, data__train=both, data__validation=both, data__packing="none")
    assert (len(prepared_data.train[0]), len(prepared_data.validation[0])) == (3, 1)


def test_long_text_file_is_read_in_chunks(tmp_path: Path) -> None:
    text = "".join(f"line {n}\n" for n in range(300_000))
    (tmp_path / "long.txt").write_text(text)
    chunks = list(Source(str(tmp_path / "long.txt"), "train", "text").chunks())
    assert len(chunks) > 2
    assert "".join(p.text for p in chunks) == text
    assert [p.is_last for p in chunks] == [False] * (len(chunks) - 1) + [True]


def test_stdlib_splits_are_disjoint() -> None:
    train, held_out = stdlib_files("train"), stdlib_files("validation")
    assert len(train) > 100
    assert len(held_out) > 10
    assert not set(train) & set(held_out)


# --- the cache -------------------------------------------------------------------------------------------------------


def prepared(tiny: dict[str, Any], **values: Any) -> Any:
    return prepare_data(check_config(with_values(tiny, **values), world_size=1, device="cpu"))


def test_cache_entry_depends_on_content_not_file_name(tiny: dict[str, Any], tmp_path: Path) -> None:
    text = Path(tiny["data"]["train"][0]["path"]).read_bytes()
    (tmp_path / "copy.jsonl").write_bytes(text)
    cache = str(tmp_path / "cache")
    first = prepared(tiny, data__cache_dir=cache, data__validation=[])
    again = prepared(
        tiny, data__cache_dir=cache, data__validation=[], data__train=[{"path": str(tmp_path / "copy.jsonl")}]
    )
    assert first.train[0].bin_path == again.train[0].bin_path
    (tmp_path / "copy.jsonl").write_bytes(text + b'{"text": "more"}\n')
    other = prepared(
        tiny, data__cache_dir=cache, data__validation=[], data__train=[{"path": str(tmp_path / "copy.jsonl")}]
    )
    assert other.train[0].bin_path != first.train[0].bin_path
    without_end = prepared(tiny, data__cache_dir=cache, data__validation=[], data__special_tokens="none")
    assert without_end.train[0].tokens == first.train[0].tokens - len(first.train[0])


# --- special tokens around documents ---------------------------------------------------------------------------------

FRAMED_TEXTS = ["seven wizards", "brew potions", "of quartz and jade while the quick fox jumps"]


def framed_config(tiny: dict[str, Any], tokenizer_name: str, folder: Path, **values: Any) -> dict[str, Any]:
    (folder / "framed.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in FRAMED_TEXTS))
    (folder / "held.jsonl").write_text(json.dumps({"text": FRAMED_TEXTS[1]}) + "\n")
    paths = {
        name: [{"path": str(folder / f"{file}.jsonl")}] for name, file in (("train", "framed"), ("validation", "held"))
    }
    return with_values(
        tiny, data__tokenizer=str(save(tokenizer_name, folder)), data__train=paths["train"], data__sequence_length=8,
        data__validation=paths["validation"], data__cache_dir=str(folder / "cache"), **values,
    )  # fmt: skip


@pytest.mark.parametrize("mode", [None, "tokenizer", "end", "none"])
@pytest.mark.parametrize("tokenizer_name", KINDS)
def test_special_tokens_frame_documents(
    tokenizer_name: str, mode: str | None, tiny: dict[str, Any], tmp_path: Path
) -> None:
    config = framed_config(tiny, tokenizer_name, tmp_path, data__special_tokens=mode)
    if mode == "end" and KINDS[tokenizer_name].end is None:
        with pytest.raises(ConfigError, match="needs an end-of-text token"):
            prepared(config)
        return
    prepared_data, tokenizer = prepared(config), make(tokenizer_name)
    tokens = {"end": ["TEXT", KINDS[tokenizer_name].end], "none": ["TEXT"]}.get(
        mode or "tokenizer", framed_by(KINDS[tokenizer_name])
    )

    def expected(text: str) -> list[int]:
        inside = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
        split = tokens.index("TEXT")
        return tokenizer.convert_tokens_to_ids([*tokens[:split], *inside, *tokens[split + 1 :]])

    assert [prepared_data.train[0].document(n).tolist() for n in range(3)] == [expected(text) for text in FRAMED_TEXTS]
    assert prepared_data.validation[0].document(0).tolist() == expected(FRAMED_TEXTS[1]), (
        "validation is framed in the same way"
    )
    assert [*prepared_data.frame.prefix_tokens, "TEXT", *prepared_data.frame.suffix_tokens] == tokens
    assert document_frame(check_config(config, world_size=1, device="cpu")) == prepared_data.frame
    if mode in (None, "tokenizer"):
        whole = tokenizer(FRAMED_TEXTS[0])["input_ids"]
        end = tokenizer.eos_token_id
        assert expected(FRAMED_TEXTS[0]) == whole + ([end] if end is not None and end not in whole else [])


def test_long_document_has_special_tokens_once(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many pieces it is read in and samples it is cut into; an empty one has no frame."""
    monkeypatch.setattr("trainer.data.documents._CHUNK_SIZE", 30)
    (tmp_path / "long.txt").write_text("\n\n" + "seven wizards\n" * 40)
    (tmp_path / "zero.txt").write_text("")
    config = framed_config(tiny, "bert", tmp_path)
    prepared_data = prepared(with_values(config, data__train=[{"path": str(tmp_path / "*.txt")}]))
    seven, wizards = make("bert").convert_tokens_to_ids(["seven", "wizards"])
    before, after = prepared_data.frame.prefix[0], prepared_data.frame.suffix[0]
    assert prepared_data.train[0].document(0).tolist() == [before, *([seven, wizards] * 40), after]
    assert len(prepared_data.train[0]) == 1
    samples = ConcatenatedSamples(prepared_data.train[0], 8)
    assert sum(samples.ids(n).tolist().count(before) for n in range(len(samples))) == 1


def test_cache_names_match_earlier_versions(tiny: dict[str, Any], tmp_path: Path) -> None:
    """`"end"` and `"none"` have the names that `append_end_of_text` gave; another frame has another name."""
    names = {}
    for mode in ("end", "none", "tokenizer"):
        config = framed_config(tiny, "llama", tmp_path, data__special_tokens=mode)
        names[mode] = prepared(config).train[0].bin_path.parent.name
    tokenizer = make("llama")
    content = Source(str(tmp_path / "framed.jsonl"), "train", "text").content_hash()
    for mode, end in (("end", tokenizer.eos_token_id), ("none", None)):
        settings = [1, tokenizer_hash(tokenizer), "text", end, "uint16"]
        digest = hashlib.sha256(json.dumps([settings, content], sort_keys=True).encode()).hexdigest()
        assert names[mode] == f"tokens-{digest[:32]}"
    assert names["tokenizer"] not in (names["end"], names["none"])


def test_trained_tokenizer_adds_only_end_of_text(tiny: dict[str, Any]) -> None:
    """The same token files as before this key; known before the tokenizer is trained."""
    whole, end = prepared(tiny), prepared(tiny, data__special_tokens="end")
    assert [t.bin_path for t in whole.train] == [t.bin_path for t in end.train]
    assert whole.frame == DocumentFrame((), (whole.tokenizer.eos_token_id,), (), ("<|endoftext|>",))
    assert document_frame(check_config(tiny, world_size=1, device="cpu")) == whole.frame
    assert not prepared(tiny, data__special_tokens="none").frame.suffix


def test_text_dependent_special_tokens_are_refused() -> None:
    class Moody:
        eos_token_id = 1

        def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
            return {"input_ids": [*([len(text)] if add_special_tokens else []), 7, 8]}

    with pytest.raises(ConfigError, match="does not add the same special tokens to every text"):
        resolve_frame(Moody(), "tokenizer")  # type: ignore[arg-type]


@pytest.mark.fast
def test_prompt_prefix_follows_recorded_frame(tmp_path: Path) -> None:
    """And none after token files, or without a record where the tokenizer does not add the same to every text."""
    from launch.generate import tokenizer_of

    class Moody:
        def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
            return {"input_ids": [*([len(text)] if add_special_tokens else []), 7, 8]}

    tokenizer = tokenizer_of(str(save("llama", tmp_path)))
    begin = tuple(tokenizer.convert_tokens_to_ids(["<s>"]))
    assert resolve_prompt_prefix(tokenizer, None) == begin, "a folder of unknown origin"
    assert resolve_prompt_prefix(Moody(), None) == ()
    for frame, prefix in ((DocumentFrame((5, 6), (2,)).as_json(), (5, 6)), (None, ())):
        stored = {"run": {}, "data": {"special_tokens": "tokenizer"}, "tessera": {"document_frame": frame}}
        (tmp_path / "config.json").write_text(json.dumps(stored))
        assert resolve_prompt_prefix(Moody(), stored_run(tmp_path)) == prefix
    for mode, prefix in (("tokenizer", begin), ("end", ()), ("none", ())):
        manifest_alone = StoredRun(tmp_path, {"run": {}, "data": {"special_tokens": mode}}, {})
        assert resolve_prompt_prefix(tokenizer, manifest_alone) == prefix, "a checkpoint's manifest records no frame"


@pytest.mark.parametrize(("mode", "prefix"), [("tokenizer", ["<s>"]), ("end", []), ("none", []), (None, [])])
def test_prompts_get_document_prefix(mode: str | None, prefix: list[str], tmp_path: Path) -> None:
    """Without the end; of a run by an earlier version (None), as that version did."""
    from launch.generate import tokenizer_of
    from trainer.model import generate_texts

    data = {"append_end_of_text": True} if mode is None else {"special_tokens": mode}
    tokenizer = tokenizer_of(str(save("llama", tmp_path)))
    about = {} if mode is None else {"document_frame": resolve_frame(tokenizer, mode).as_json()}  # type: ignore[arg-type]
    (tmp_path / "config.json").write_text(json.dumps({"run": {}, "data": data, "tessera": about}))
    asked = []

    class Model:
        device = "cpu"

        def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
            asked.append(input_ids[0].tolist())
            assert attention_mask.tolist() == [[1] * input_ids.shape[1]]
            return torch.cat([input_ids, torch.tensor([[tokenizer.eos_token_id]])], 1)

    ids = resolve_prompt_prefix(tokenizer, stored_run(tmp_path))
    options: dict[str, Any] = {"tokens": 1, "temperature": 0.0}
    texts = list(generate_texts(Model(), tokenizer, ["brew potions"], prefix=ids, **options))
    inside = tokenizer("brew potions", add_special_tokens=False)["input_ids"]
    assert asked == [[*tokenizer.convert_tokens_to_ids(prefix), *inside]]
    assert texts == [tokenizer.decode(inside)]


# --- samples and batches ---------------------------------------------------------------------------------------------


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


def test_single_token_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 tokens, and a sample has 2 at least"):
        ConcatenatedSamples(write_tokens(tmp_path / "t", [[5]]), 3)


def two_sources(tiny: dict[str, Any], folder: Path, **values: Any) -> dict[str, Any]:
    """Two token files: 6 whole samples and one with 5 targets, and one sample with 2 targets."""
    paths: dict[str, list[dict[str, str]]] = {}
    for split in ("train", "validation"):
        for name, count in (("long", 6 * LENGTH + 6), ("short", 3)):
            tokens = write_tokens(folder / f"{split}-{name}", [[1 + n % 300 for n in range(count)]])
            paths.setdefault(split, []).append({"path": str(tokens.bin_path)})
    return with_values(tiny, data__train=paths["train"], data__validation=paths["validation"], **values)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_epoch_covers_every_target_once(world: int, tiny: dict[str, Any], tmp_path: Path) -> None:
    """An epoch trains on every target once, whatever the world; micro-batches keep one shape and need no mask."""
    config = two_sources(tiny, tmp_path, deepspeed__train_micro_batch_size_per_gpu=1)
    loaded = check_config(config, world_size=world, device="cpu")
    rank_batches = [open_batches(loaded, prepared(config), Topology.of(world, rank)) for rank in range(world)]
    assert {batches.train.epochs_after(1) for batches in rank_batches} == {1.0}
    micros = [micro for batches in rank_batches for micro in batches.train.batch_at(1).micro_batches]
    counts = sorted(micro.num_targets for micro in micros)
    assert counts == [2, 5, *[LENGTH] * 6]
    assert {batches.train.batch_at(1).tokens for batches in rank_batches} == {6 * LENGTH + 7} == {sum(counts)}
    assert {tuple(micro.inputs["input_ids"].shape) for micro in micros} == {(1, LENGTH)}
    assert all(micro.inputs.get("attention_mask") is None for micro in micros)
    held_out = [micro for batches in rank_batches for micro in batches.validation or ()]
    assert sum(micro.num_targets for micro in held_out) == 6 * LENGTH + 7
    assert {micro.inputs["input_ids"].shape[1] for micro in held_out} == {LENGTH}


def test_drop_last_omits_partial_samples(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = two_sources(tiny, tmp_path, data__drop_last=True)
    with pytest.raises(DataError, match="short\\.bin: 3 tokens, fewer than one sample"):
        open_batches(check_config(config, world_size=1, device="cpu"), prepared(config), Topology.of(1, 0))
    alone = with_values(config, data__train=config["data"]["train"][:1], data__validation=[])
    rank_batches = open_batches(check_config(alone, world_size=1, device="cpu"), prepared(alone), Topology.of(1, 0))
    assert rank_batches.train.epochs_after(3) == pytest.approx(3 * 8 / 6)
    assert rank_batches.train.batch_at(1).tokens == 8 * LENGTH


def test_load_balancing_loss_gets_padding_mask(tiny: dict[str, Any], tmp_path: Path) -> None:
    """A mixture's load-balancing loss counts tokens, so there padding is masked out."""
    mixture = {"model_type": "mixtral", "vocab_size": 320, "hidden_size": 32, "num_local_experts": 4}
    for balances, expected in ((True, [2, 5]), (False, [])):
        config = two_sources(tiny, tmp_path, model={"config": {**mixture, "output_router_logits": balances}},
                             deepspeed__train_micro_batch_size_per_gpu=1)  # fmt: skip
        rank_batches = open_batches(
            check_config(config, world_size=1, device="cpu"), prepared(config), Topology.of(1, 0)
        )
        masks = [micro.inputs.get("attention_mask") for micro in rank_batches.train.batch_at(1).micro_batches]
        assert sorted(int(mask.sum()) for mask in masks if mask is not None) == expected


COLLATE = partial(TASKS["causal_lm"].collate, collation=Collation(4, 0, pad_to_multiple_of=8, mask_padding=True))


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


def _rows(batches: TrainBatches, step: int) -> list[tuple[int, ...]]:
    return [tuple(row) for micro in batches.batch_at(step).micro_batches for row in micro.labels.tolist()]


@pytest.mark.parametrize("packing", ["concatenate", "none"])
@pytest.mark.parametrize("world", range(1, 9))
def test_ranks_together_read_serial_order(packing: str, world: int, tiny: dict[str, Any]) -> None:
    """For every world size, over the border of an epoch: the same samples in the same step, none twice."""
    values = {"deepspeed__train_batch_size": {5: 15, 7: 21}.get(world, 24), "data__packing": packing}
    config = with_values(tiny, deepspeed__train_micro_batch_size_per_gpu=1, **values)
    serial = open_batches(check_config(config, world_size=1, device="cpu"), prepared(config), Topology.of(1, 0)).train
    loaded = check_config(config, world_size=world, device="cpu")
    ranks = [open_batches(loaded, prepared(config), Topology.of(world, rank)).train for rank in range(world)]
    border = round(1 / serial.epochs_after(1))
    for step in (1, border, border + 1, border + 2):
        expected = sorted(map(_trim, _rows(serial, step)))
        assert sorted(_trim(row) for rank in ranks for row in _rows(rank, step)) == expected
        assert {rank.batch_at(step).tokens for rank in ranks} == {serial.batch_at(step).tokens}
        counted = sum(m.num_targets for rank in ranks for m in rank.batch_at(step).micro_batches)
        assert counted == serial.batch_at(step).tokens


def _trim(row: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(label for label in row if label != IGNORE_INDEX)


def test_micro_batches_are_layout_independent(tiny: dict[str, Any]) -> None:
    config = with_values(tiny, data__packing="none")
    prepared_data = []
    for world in (1, 2, 4):
        loaded = check_config(config, world_size=world, device="cpu")
        ranks = [open_batches(loaded, prepared(config), Topology.of(world, rank)).train for rank in range(world)]
        micros = [micro for rank in ranks for micro in rank.batch_at(3).micro_batches]
        prepared_data.append(sorted(json.dumps(m.labels.tolist()) for m in micros))
    assert prepared_data[0] == prepared_data[1] == prepared_data[2]


def _shape(**values: Any) -> BatchShape:
    return BatchShape(**{"train": 4, "micro": 2, "data_rank": 0, "data_ranks": 1, "collate": COLLATE, **values})


def _checked(tmp_path: Path, documents: list[list[int]], vocabulary: int = 100) -> CheckedSamples:
    tokens = write_tokens(tmp_path / "t", documents)
    return CheckedSamples(DocumentSamples(tokens, 4), tokens, vocabulary)


def test_prefetch_thread_errors_reach_caller(tmp_path: Path) -> None:
    samples = _checked(tmp_path, [[1, 2]] * 7 + [[1, 200]])
    batches = TrainBatches([samples], SampleOrder((8,), (1.0,), 1), _shape(), pin=False)
    with pytest.raises(DataError, match="is 200, outside the model's vocabulary of 100"):
        for _ in batches.steps(1, 2):
            pass


def test_closed_iterator_joins_prefetch_thread(tmp_path: Path) -> None:
    samples = _checked(tmp_path, [[1, 2, 3]] * 8)
    steps = TrainBatches([samples], SampleOrder((8,), (1.0,), 1), _shape(), pin=False).steps(1, 1000)
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name == "batches"]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("limit", [None, 1, 2])
def test_evaluation_reads_each_sample_once(ranks: int, limit: int | None, tmp_path: Path) -> None:
    samples = _checked(tmp_path, [[n, n + 1, 99] for n in range(11)])
    per_rank = [list(EvaluationBatches([samples], _shape(data_rank=r, data_ranks=ranks), limit)) for r in range(ranks)]
    assert len({len(batches) for batches in per_rank}) == 1, "ranks must take equally many steps"
    seen = [row[0] for batches in per_rank for m in batches for row in m.labels.tolist() if row[0] != IGNORE_INDEX]
    assert sorted(seen) == list(range(1, 1 + min(11, (limit or 99) * 4)))


@pytest.mark.parametrize(
    ("samples", "limit", "shares"),
    [
        ((100, 100), 10, [20, 20]),
        ((300, 100), 10, [30, 10]),
        ((1000, 1), 10, [39, 1]),
        ((1000, 10, 10), 10, [32, 4, 4]),
        ((90, 70, 10, 3), 10, [19, 14, 4, 3]),
        ((100, 100, 100), 1, [4, 4, 4]),
        ((100, 2), 1, [4, 2]),
        ((7, 5), 3, [7, 5]),
        ((7, 5), None, [7, 5]),
        ((50,), 3, [12]),
    ],
)
def test_evaluation_samples_are_allocated_proportionally(
    samples: tuple[int, ...], limit: int | None, shares: list[int]
) -> None:
    """In proportion, of batches of 4 samples, and at least one batch of each source or all of it."""
    assert allocate_evaluation_samples(samples, 4, limit) == shares


def test_evaluation_allocation_invariants() -> None:
    draw = random.Random(3)
    for _ in range(300):
        samples = [draw.randint(1, 200) for _ in range(draw.randint(1, 6))]
        batch, limit = draw.randint(1, 16), draw.randint(1, 40)
        shares = allocate_evaluation_samples(samples, batch, limit)
        least = [min(count, batch) for count in samples]
        assert all(low <= share <= count for low, share, count in zip(least, shares, samples, strict=True))
        assert sum(shares) == min(sum(samples), max(limit * batch, sum(shares) if shares == least else 0))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_limited_evaluation_covers_every_source(ranks: int, tmp_path: Path) -> None:
    """Each chosen sample once, the same ones on any number of ranks."""
    sources = []
    for number, count in enumerate((20, 6, 3)):
        tokens = write_tokens(tmp_path / str(number), [[1, 30 * number + n, 99] for n in range(count)])
        sources.append(CheckedSamples(DocumentSamples(tokens, 4), tokens, 100))
    per_rank = [list(EvaluationBatches(sources, _shape(data_rank=r, data_ranks=ranks), 4)) for r in range(ranks)]
    assert len({len(batches) for batches in per_rank}) == 1
    seen = [row[0] for batches in per_rank for m in batches for row in m.labels.tolist() if row[0] != IGNORE_INDEX]
    assert sorted(seen) == [*range(9), *range(30, 34), *range(60, 63)]


def test_evaluation_counts_source_not_files(tiny: dict[str, Any], tmp_path: Path) -> None:
    """The files of a glob share what their source may have: one batch of each source, not of each file."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for number in range(3):
            write_tokens(tmp_path / folder / str(number), [[1 + (ord(folder) + number) % 7] * (5 * LENGTH + 1)])
    paths = [{"path": str(tmp_path / folder / "*.bin")} for folder in ("a", "b")]
    config = with_values(tiny, data__validation=paths, evaluation={"max_batches": 2})
    rank_batches = open_batches(check_config(config, world_size=1, device="cpu"), prepared(config), Topology.of(1, 0))
    assert rank_batches.validation is not None
    rows = [row[0] for micro in rank_batches.validation for row in micro.labels.tolist()]
    assert rows == [1 + (ord(folder) + n) % 7 for folder in ("a", "b") for n in (0, 0, 0, 0, 0, 1, 1, 1)]


def test_labels_are_inputs_shifted_by_one(tiny: dict[str, Any]) -> None:
    batches = open_batches(check_config(tiny, world_size=1, device="cpu"), prepared(tiny), Topology.of(1, 0)).train
    micro = batches.batch_at(1).micro_batches[0]
    assert micro.inputs["input_ids"].shape == micro.labels.shape == (2, LENGTH)
    assert (micro.inputs["input_ids"][:, 1:] == micro.labels[:, :-1]).all()


def test_hub_dataset_streams_both_splits(tmp_path: Path) -> None:
    """Streamed from a hub on the loopback address, in a process of its own that has it as HF_ENDPOINT."""
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
