"""The files and the manifest of a checkpoint, and checkpoints of earlier formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from tests.checkpoint.cases import make_manifest, run_cli
from tests.checkpoint_jobs import read_state
from tests.commands import ROOT, read_rows
from tests.configs import with_values
from trainer.checkpoint.writer import refuse_incomplete_coverage, sort_by_element_size
from trainer.checkpoint_format import (
    MANIFEST,
    Chunk,
    ChunkReader,
    FileRecord,
    StoredTensor,
    TensorChunk,
    checksum,
    read_manifest,
    split_into_files,
    verify_files,
    write_chunks,
)
from trainer.errors import CheckpointError
from trainer.files import hash_file

FORMAT_1 = ROOT / "tests" / "data" / "format_1"
CHECKPOINT_1 = FORMAT_1 / "step-00000003"

COMPLETE = (((0, 0), (4, 2)), ((0, 2), (1, 4)), ((1, 2), (3, 4)))
INCOMPLETE = {
    "missing": (((0, 0), (4, 2)), ((0, 2), (1, 4))),
    "overlap of equal count": (((0, 0), (4, 5)), ((0, 4), (4, 1))),
    "past the end": (((0, 0), (4, 3)), ((0, 4), (4, 3))),
    "overlap": (((0, 0), (3, 6)), ((2, 0), (1, 6))),
}
"""(offsets, sizes) of chunks of a tensor of shape (4, 6)."""

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64)


def stored_tensor(chunks: Any) -> StoredTensor:
    return StoredTensor((4, 6), "F32", tuple(Chunk("f", 0, offsets, sizes) for offsets, sizes in chunks))


@pytest.mark.fast
@pytest.mark.parametrize("name", INCOMPLETE)
def test_incomplete_or_overlapping_chunks_are_refused(name: str) -> None:
    refuse_incomplete_coverage("x", stored_tensor(COMPLETE))
    with pytest.raises(CheckpointError, match="x: "):
        refuse_incomplete_coverage("x", stored_tensor(INCOMPLETE[name]))


@pytest.mark.fast
def test_files_are_safetensors_of_bounded_size(tmp_path: Path) -> None:
    tensors = [torch.arange(15).view(3, 5).to(dtype) for dtype in DTYPES]
    chunks = [TensorChunk(f"t{i}", "weight", (3, 5), (0, 0), tensor) for i, tensor in enumerate(tensors)]
    chunks.append(TensorChunk("scalar", "buffer", (), (), torch.tensor(3.5)))
    chunks.append(TensorChunk("empty", "buffer", (0, 2), (0, 0), torch.empty(0, 2)))
    files = list(split_into_files(sort_by_element_size(chunks), max_bytes=130))
    assert [sum(chunk.bytes for chunk in file) <= 130 or len(file) == 1 for file in files] == [True] * len(files)
    assert len(files) > 2
    reader = ChunkReader(tmp_path)
    for i, file_chunks in enumerate(files):
        path = tmp_path / f"{i}.safetensors"
        record, index = write_chunks(path, file_chunks)
        assert record == FileRecord(path.name, path.stat().st_size, hash_file(path))
        reference = load_file(path)
        for chunk, entry in zip(file_chunks, index, strict=True):
            assert reference[chunk.key].equal(chunk.tensor)
            assert reader.view(entry.chunk, entry.dtype).equal(chunk.tensor), entry.name
            assert entry.shape == chunk.shape


@pytest.mark.fast
def test_manifest_has_pinned_format(tmp_path: Path) -> None:
    """A change of these bytes is a new format: `FORMAT` must rise, and the reader must keep reading this one."""
    stored = StoredTensor((4, 6), "F32", (Chunk("rank-00000.safetensors", 128, (0, 2), (4, 4)),))
    manifest = make_manifest(
        step=7,
        created="2026-11-24T00:00:00+00:00",
        tokens=11,
        samples=3,
        losses={"train": 1.5, "validation": None},
        config={"run": {"name": "n"}},
        data={"weights": [1.0]},
        model={"class": "LlamaForCausalLM"},
        trackers={"wandb": {"run_id": "abc"}},
        scalar_state={"counters": {}, "scaler": {}, "scalars": {"": {"step": 7.0}}},
        files=(FileRecord("rank-00000.safetensors", 192, "00"),),
        tensors={("w", "exp_avg"): stored},
    )
    assert manifest.to_json() == (
        '{"checksum":"CHECKSUM","format":2,"step":7,"attempt":1,"created":"2026-11-24T00:00:00+00:00","tokens":11,'
        '"samples":3,"losses":{"train":1.5,"validation":null},"config":{"run":{"name":"n"}},'
        '"about":{"world":{"pipeline":1,"data":1,"tensor":1}},"model":{"class":"LlamaForCausalLM"},'
        '"data":{"weights":[1.0]},"trackers":{"wandb":{"run_id":"abc"}},'
        '"numbers":{"counters":{},"scaler":{},"scalars":{"":{"step":7.0}}},'
        '"files":[{"name":"rank-00000.safetensors","bytes":192,"hash":"00"}],'
        '"tensors":{"w":{"exp_avg":{"dtype":"F32","shape":[4,6],"boxes":[[0,128,[0,2],[4,4]]]}}}}'
    ).replace("CHECKSUM", json.loads(manifest.to_json())["checksum"])
    (tmp_path / MANIFEST).write_text(manifest.to_json())
    assert read_manifest(tmp_path) == manifest


@pytest.mark.fast
def test_checkpoint_of_format_1_is_read() -> None:
    manifest = read_manifest(CHECKPOINT_1)
    verify_files(CHECKPOINT_1, manifest)
    assert (manifest.step, manifest.samples, manifest.tokens, manifest.attempt) == (3, 48, 1512, 1)
    assert manifest.trackers == {"wandb": {"run_id": "bee99fec7532"}}
    assert manifest.scalar_state["scalars"] == {"": {"step": 3.0}}
    assert manifest.about["world"] == {"processes": 2, "data": 1, "pipeline": 2, "tensor": 1}
    state = read_state(CHECKPOINT_1)
    hashes = {
        key: xxhash.xxh3_128_hexdigest(t.view(-1).view(torch.uint8).numpy().tobytes()) for key, t in state.items()
    }
    assert hashes == json.loads((FORMAT_1 / "expected.json").read_text())["tensors"]


@pytest.mark.parametrize("world", [1, 2])
def test_checkpoint_of_format_1_resumes(world: int, tmp_path: Path) -> None:
    """In the layout that wrote it, and on one rank: with the losses of then, in the same W&B run, saved in format 2."""
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(CHECKPOINT_1, checkpoints / CHECKPOINT_1.name)
    config = with_values(
        json.loads((FORMAT_1 / "config.json").read_text()),
        run__output_dir=str(tmp_path / "run"),
        data__cache_dir=str(tmp_path / "cache"),
        training__max_steps=6,
        parallel__pipeline=world,
    )
    ended = run_cli(config, tmp_path, world=world)
    assert ended.status == 0, ended.err
    assert "resuming from step 3" in ended.out
    expected = json.loads((FORMAT_1 / "expected.json").read_text())["losses"]
    losses = {str(row["step"]): row["loss"] for row in read_rows(tmp_path / "run") if row["split"] == "train"}
    assert losses == pytest.approx({step: expected[step] for step in ("4", "5", "6")}, rel=1e-5 if world == 2 else 1e-3)
    assert (tmp_path / "run" / "wandb" / "run-id").read_text() == "bee99fec7532"
    assert json.loads((checkpoints / "step-00000006" / MANIFEST).read_text())["trackers"]["wandb"] == {
        "run_id": "bee99fec7532"
    }


@pytest.mark.fast
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", "00000100/../../victim"),
        ("tokens", -1),
        ("files", [{"name": "../x", "bytes": 1, "hash": ""}]),
        ("trackers", {"wandb": "abc"}),
        ("trackers", {"wandb": {"run_id": 3}}),
    ],
)
def test_malicious_manifest_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    body = json.loads(make_manifest().to_json())
    del body["checksum"]
    (tmp_path / MANIFEST).write_text(json.dumps({"checksum": checksum(body), **body}))
    assert read_manifest(tmp_path).step == 1
    body[key] = value
    (tmp_path / MANIFEST).write_text(json.dumps({"checksum": checksum(body), **body}))
    with pytest.raises(CheckpointError, match="damaged: invalid manifest"):
        read_manifest(tmp_path)


@pytest.mark.fast
def test_unknown_format_is_refused(tmp_path: Path) -> None:
    body = {**json.loads(make_manifest().to_json()), "format": 3}
    (tmp_path / MANIFEST).write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match=r"unsupported format \(got 3, supported: 1 and 2\)"):
        read_manifest(tmp_path)
