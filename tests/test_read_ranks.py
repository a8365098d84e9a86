"""Problems of weights on one rank are raised on all ranks, and found in checkpoints as well."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.configs import with_values
from tests.harness import run_ranks
from tests.test_read import DOWN, change_weights, folder, model_from
from trainer.checkpoint.import_checkpoint import import_checkpoint
from trainer.checkpoint_format import WEIGHT, read_manifest
from trainer.config.load import check_config
from trainer.distributed import Launch, joined_world
from trainer.engine import build_engine
from trainer.errors import ConfigError
from trainer.model import build_model
from trainer.topology import Topology

__all__ = ["folder"]


def test_non_finite_checkpoint_is_refused(tiny: dict[str, Any], folder: Path) -> None:
    (source,) = run_ranks(imported, 1, with_values(tiny, model={"path": str(folder)}))
    stored = read_manifest(source).tensors[f"{DOWN}.weight", WEIGHT]
    model_from(tiny, source)
    with (source / stored.chunks[0].file).open("r+b") as file:
        file.seek(stored.chunks[0].byte_offset)
        file.write(struct.pack("<f", float("nan")))
    with pytest.raises(ConfigError, match=rf"{DOWN}\.weight in {stored.chunks[0].file}: 1 of 2048 values"):
        model_from(tiny, source)


def imported(config: dict[str, Any]) -> Path:
    """A checkpoint with the weights of the folder at `model.path`."""
    launch, loaded = Launch.from_environment(), check_config(config, world_size=1, device="cpu")
    with joined_world(launch, Topology.of(1, 0, tensor=1, pipeline=1), seed=1):
        return import_checkpoint(Path(config["model"]["path"]), loaded)


def refusal(config: dict[str, Any]) -> str:
    """What a rank that gives a model its weights is refused with."""
    launch = Launch.from_environment()
    topology = Topology.of(launch.world_size, launch.rank, tensor=2, pipeline=1)
    loaded = check_config(config, world_size=launch.world_size, device="cpu")
    with joined_world(launch, topology, seed=1) as world:
        try:
            build_engine(build_model(loaded), loaded, world)
        except ConfigError as error:
            return str(error)
    return ""


def test_problem_on_one_rank_is_raised_on_all(tiny: dict[str, Any], folder: Path) -> None:
    weight = load_file(folder / "model.safetensors")[f"{DOWN}.weight"]
    weight[0, -1] = torch.nan  # rowwise: the second tensor rank's half
    change_weights(folder, **{f"{DOWN}.weight": weight})
    config = with_values(tiny, model={"path": str(folder)}, parallel={"tensor": 2})
    first, second = run_ranks(refusal, 2, config)
    assert first == second
    assert f"{DOWN}.weight in model.safetensors: 1 of 2048 values" in first
