"""Optimizer state on NVMe."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.checkpoint.cases import OFFLOAD, RunUnbroken, run_config, with_resume
from tests.checkpoint_jobs import read_state, train_and_save
from tests.harness import run_ranks
from tools.parity.layout import Layout
from trainer.compat.deepspeed import nvme
from trainer.compat.deepspeed.layouts.zero import map_file
from trainer.config.deepspeed import is_async_io_available
from trainer.errors import CheckpointError

NVME = [
    ({}, {}),
    ({"pipeline_read": True, "pipeline_write": True}, {"deepspeed__zero_optimization__sub_group_size": 330_000}),
]


@pytest.mark.matrix  # compiling DeepSpeed's async_io takes minutes
@pytest.mark.parametrize(("offload", "values"), NVME, ids=("", "pipelined"))
def test_nvme_state_equals_state_in_memory(
    offload: dict[str, Any],
    values: dict[str, Any],
    base: dict[str, Any],
    unbroken_run: RunUnbroken,
    tmp_path: Path,
) -> None:
    """Bit for bit; also resumed from one to the other, and back."""
    if not is_async_io_available():
        pytest.skip("needs libaio-dev")
    (tmp_path / "nvme").mkdir()
    nvme_offload = {"device": "nvme", "nvme_path": str(tmp_path / "nvme"), "buffer_count": 12, **offload}
    layout = Layout(2, zero=3, changes=(("deepspeed.zero_optimization.offload_optimizer", nvme_offload),))
    on_nvme = unbroken_run("large", layout, **values)
    in_memory = unbroken_run("large", Layout(2, zero=3, changes=OFFLOAD), **values)
    files = {path.name.partition("-")[0] for path in (tmp_path / "nvme").glob(f"{on_nvme.folder.name}-*/**/*.swp")}
    assert {"exp_avg", "exp_avg_sq"} < files
    assert any("gradient" in name for name in files)
    assert on_nvme.losses == in_memory.losses
    to_nvme = with_resume(run_config(base, "large", layout, tmp_path / "to", **values), in_memory.checkpoint(3))
    from_nvme = with_resume(run_config(base, "large", Layout(2), tmp_path / "from", **values), on_nvme.checkpoint(3))
    losses = run_ranks(train_and_save, 2, to_nvme, 6, (3, 6))[0]
    assert losses == {step: loss for step, loss in on_nvme.losses.items() if step > 3}
    run_ranks(train_and_save, 2, from_nvme, 3, (3,))
    resaved = [tmp_path / name / "checkpoints" / "step-00000003" for name in ("to", "from")]
    expected = read_state(in_memory.checkpoint(3))
    for folder in (on_nvme.checkpoint(3), *resaved):
        assert [name for name, tensor in read_state(folder).items() if not tensor.equal(expected[name])] == []
    last, expected = read_state(tmp_path / "to" / "checkpoints" / "step-00000006"), read_state(in_memory.checkpoint(6))
    assert [name for name in expected if not last[name].equal(expected[name])] == []


@pytest.mark.fast
@pytest.mark.parametrize(("name", "size"), [("state.swp", 12), ("absent.swp", 0)])
def test_truncated_swap_file_is_refused(name: str, size: int, tmp_path: Path) -> None:
    """Mapping the file of a full disk would fill what is missing with zeros."""
    (tmp_path / "state.swp").write_bytes(b"\0" * 12)
    assert map_file(tmp_path / "state.swp", 3, torch.float32).numel() == 3
    with pytest.raises(CheckpointError, match=rf"{name}: {size} bytes of 16 were written"):
        map_file(tmp_path / name, 4, torch.float32)


@pytest.mark.fast
def test_unaligned_gradients_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvme, "_block_bytes", lambda folder: 512)
    swapper = SimpleNamespace(swap_folder=tmp_path, _adjust_for_misaligned_lengths=lambda tensors, offsets: tensors)
    nvme.keep_unaligned_gradients(SimpleNamespace(optimizer_swapper=swapper))
    gradients = swapper._adjust_for_misaligned_lengths([torch.zeros(3) for _ in range(3)], [0, 100, 128])
    assert [getattr(gradient, "swappable", True) for gradient in gradients] == [True, False, True]


@pytest.mark.fast
def test_nvme_folder_is_separate_for_each_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvme.optimizer_utils, "AIO_ALIGNED_BYTES", 1024)
    monkeypatch.setattr(nvme, "_block_bytes", lambda folder: 4096)
    paths = set()
    for run in ("one/run", "two/run", "two/run"):
        offload = {"device": "nvme", "nvme_path": str(tmp_path)}
        settings = {"zero_optimization": {"stage": 3, "offload_optimizer": offload}}
        nvme.prepare_nvme(settings, run)
        paths.add(settings["zero_optimization"]["offload_optimizer"]["nvme_path"])  # type: ignore[index]
        assert offload["nvme_path"] == str(tmp_path), "the resolved configuration is not modified"
    assert {str(path) for path in tmp_path.iterdir()} == paths
    assert len(paths) == 2
    assert nvme.optimizer_utils.AIO_ALIGNED_BYTES == 4096
