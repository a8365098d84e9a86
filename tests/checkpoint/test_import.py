"""Importing DeepSpeed checkpoints; code in files of other owners never runs."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from tests.checkpoint.cases import run_cli, run_tool, validation_sources
from tests.checkpoint_jobs import read_state
from tests.configs import with_values
from tests.harness import run_ranks
from trainer.checkpoint.deepspeed_to_safetensors import _load_tensors
from trainer.checkpoint_format import MANIFEST, checksum
from trainer.distributed import Launch, joined_world
from trainer.files import hash_file
from trainer.topology import Topology


def save_deepspeed_checkpoint(folder: str, weights: dict[str, Any], stage: int) -> None:
    """Train a data-parallel model without our code, and save it with DeepSpeed's `save_checkpoint`."""
    import deepspeed
    from transformers import LlamaConfig, LlamaForCausalLM

    launch = Launch.from_environment()
    with joined_world(launch, Topology.of(launch.world_size, launch.rank), seed=0):
        model = LlamaForCausalLM(LlamaConfig(**weights))
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        }
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
        ids_BT = torch.arange(12)[None] + launch.rank
        engine.backward(engine(input_ids=ids_BT, labels=ids_BT).loss)
        engine.step()
        engine.save_checkpoint(folder)
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
            if launch.rank == 0:
                torch.save({name: p.detach().float() for name, p in model.named_parameters()}, f"{folder}/expected")


class _PickledByGetattr:
    """Pickles an attribute by `getattr`, as early releases of Python 3.11 pickle members of enumerations.

    With another object the same pickle is an attack.
    """

    def __init__(self, target: Any, name: str) -> None:
        self._reduced = getattr, (target, name)

    def __reduce__(self) -> Any:
        return self._reduced


@pytest.mark.fast
def test_enum_pickled_by_getattr_is_read(tmp_path: Path) -> None:
    file = tmp_path / "saved.pt"
    torch.save({"zero_stage": _PickledByGetattr(ZeroStageEnum, "gradients"), "weight": torch.ones(2)}, file)
    loaded = _load_tensors(file)
    assert loaded["zero_stage"] == 2
    assert loaded["weight"].tolist() == [1, 1]
    torch.save({"zero_stage": _PickledByGetattr(Path, "unlink")}, file)
    with pytest.raises(SystemExit, match=r"would run pathlib\.Path"):
        _load_tensors(file)


@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=pytest.mark.matrix) for stage in (0, 3))])
def test_deepspeed_checkpoint_is_imported(stage: int, base: dict[str, Any], tmp_path: Path) -> None:
    source = tmp_path / "deepspeed"
    source.mkdir()
    model_config = {key: value for key, value in base["model"]["config"].items() if key != "model_type"}
    run_ranks(save_deepspeed_checkpoint, 2, str(source), model_config, stage)
    config = with_values(base, run__output_dir=str(tmp_path / "run"), training__max_steps=1)
    (tmp_path / "config.json").write_text(json.dumps(config))
    imported = run_tool("import", source, "--config", tmp_path / "config.json")
    assert imported.status == 0, imported.err
    state = read_state(tmp_path / "run" / "checkpoints" / "step-00000000")
    expected = torch.load(source / "expected", weights_only=True)
    assert {f"weight/{name}" for name in expected} == state.keys()
    assert all(state[f"weight/{name}"].equal(expected[name]) for name in expected)
    ended = run_cli(config, tmp_path)
    assert ended.status == 0, ended.err
    assert "resuming from step 0" in ended.out
    second = run_tool("import", source, "--config", tmp_path / "config.json")
    assert second.status == 2
    assert "holds checkpoints" in second.err


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (Path(self.path), "sings")


def test_code_in_checkpoints_never_runs(uploaded_run: Path, base: dict[str, Any], tmp_path: Path) -> None:
    """Neither pickles in a checkpoint or in DeepSpeed's files nor code that a model's configuration names."""
    canary = tmp_path / "canary"
    pickled = io.BytesIO()
    torch.save({"module": {"a": torch.zeros(1)}, "x": Canary(str(canary))}, pickled)
    source = tmp_path / "deepspeed"
    source.mkdir()
    (source / "mp_rank_00_model_states.pt").write_bytes(pickled.getvalue())
    config = with_values(base, run__output_dir=str(tmp_path / "run"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused = run_tool("import", source, "--config", tmp_path / "config.json")
    assert refused.status == 4
    assert "would run" in refused.err

    step = tmp_path / "evil" / "checkpoints" / "step-00000006"
    shutil.copytree(uploaded_run / "run" / "checkpoints" / "step-00000006", step)
    (step / "rank-00000.safetensors").write_bytes(pickled.getvalue())
    (step / "optimizer.pt").write_bytes(pickled.getvalue())
    body = json.loads((step / MANIFEST).read_text())
    digest = hash_file(step / "rank-00000.safetensors")
    body["files"][0] = {"name": "rank-00000.safetensors", "bytes": len(pickled.getvalue()), "hash": digest}
    body["model"]["config"]["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    del body["checksum"]
    (step / MANIFEST).write_text(json.dumps({"checksum": checksum(body), **body}))
    assert run_tool("verify", tmp_path / "evil").status == 0, "an attacker can compute hashes"
    loaded = run_cli(
        with_values(config, checkpoint__resume=str(step), data__validation=validation_sources(base)), tmp_path
    )
    assert loaded.status == 4, loaded.out + loaded.err
    exported = run_tool("export", step, tmp_path / "out")
    assert exported.status == 4, exported.out + exported.err
    assert "auto_map" not in "".join(f.read_text() for f in (tmp_path / "out").glob("*.json"))
    assert not canary.exists()
