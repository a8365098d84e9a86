"""Copies of checkpoints in object stores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.cases import flip_bit, run_cli, run_in_one_world, validation_sources
from tests.configs import with_values
from trainer.checkpoint.object_store import ObjectStore
from trainer.checkpoint.saved import checkpoint_name
from trainer.checkpoint_format import MANIFEST, read_manifest, verify_files
from trainer.errors import CheckpointError


def test_remote_copy_is_fetched_and_verified(uploaded_run: Path, base: dict[str, Any], tmp_path: Path) -> None:
    """Where the run directory has no valid checkpoint; retention applies to copies, and damage is detected in them."""
    copies = tmp_path / "copies"
    shutil.copytree(uploaded_run / "copies", copies)
    assert sorted(path.name for path in copies.glob("step-*")) == ["step-00000004", "step-00000006"]
    from_copies = with_values(
        base,
        run__output_dir=str(tmp_path / "named"),
        training__max_steps=8,
        data__validation=validation_sources(base),
        checkpoint__resume=f"file://{copies}",
    )
    assert list(run_in_one_world([(from_copies, 8)], world=3)[0]) == [7, 8]
    verify_files(fetched := tmp_path / "named" / "checkpoints" / "step-00000006", read_manifest(fetched))
    config = with_values(
        base,
        run__output_dir=str(tmp_path / "run"),
        training__max_steps=8,
        checkpoint__upload=f"file://{copies}",
        data__validation=validation_sources(base),
        deepspeed__optimizer__params__lr=0.125,
    )
    ended = run_cli(config, tmp_path)
    assert ended.status == 0, ended.err
    assert "resuming from step 6" in ended.out
    before = base["deepspeed"]["optimizer"]["params"]["lr"]
    assert f"changed since the last attempt: deepspeed.optimizer.params.lr: {before} -> 0.125" in ended.out
    assert (copies / "latest").read_text() == "step-00000008\n"
    assert read_manifest(tmp_path / "run" / "checkpoints" / "step-00000008").attempt == 2
    for folder in (tmp_path / "run" / "checkpoints").glob("step-*"):
        flip_bit(folder / "rank-00000.safetensors")
    assert run_in_one_world([(config, 8)]) == [{}], "all local checkpoints are damaged: the copy replaces the last"
    verify_files(restored := tmp_path / "run" / "checkpoints" / "step-00000008", read_manifest(restored))
    flip_bit(copies / "step-00000008" / "rank-00000.safetensors")
    shutil.rmtree(tmp_path / "run")
    from_copies = with_values(from_copies, run__output_dir=str(tmp_path / "run"))
    status, message = run_in_one_world([(from_copies, 8)], world=2)[0]
    assert status == 4
    assert "damaged" in message
    damaged = run_cli(config, tmp_path)
    assert damaged.status == 4
    assert "damaged" in damaged.err


@pytest.mark.fast
def test_remote_copy_is_complete_once_manifest_exists(tmp_path: Path) -> None:
    """In an object store a copy is found only with its manifest; deletion removes that first."""
    object_store = ObjectStore.connect(f"memory://{tmp_path.name}/run")
    assert object_store.newest() is None
    for step, attempt in ((10, 1), (20, 1), (15, 2)):
        folder = tmp_path / checkpoint_name(step)
        folder.mkdir()
        (folder / "rank-00000.safetensors").write_bytes(b"x" * step)
        (folder / MANIFEST).write_text(json.dumps({"attempt": attempt, "step": step}))
        newest = object_store.newest()
        object_store.upload(folder, ["rank-00000.safetensors"])
        assert object_store.newest() == newest
        object_store.upload(folder, [MANIFEST])
        assert object_store.newest() == folder.name, "a later attempt is newer, and so is a later step"
    object_store.fetch(checkpoint_name(20), "rank-00000.safetensors", tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == b"x" * 20
    for _ in range(2):  # deleting an absent copy does nothing
        object_store.delete(checkpoint_name(15))
    assert object_store.newest() == checkpoint_name(20)
    assert ObjectStore.connect(f"memory://{tmp_path.name}/run/{checkpoint_name(10)}").newest() == ""
    with pytest.raises(CheckpointError, match="cannot be copied"):
        object_store.fetch(checkpoint_name(20), "absent", tmp_path / "absent")
