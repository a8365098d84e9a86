"""What ranks do in the checkpoint tests: train, save, go on from what another layout has saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.runs import _loaded, _place
from trainer.checkpoint import Checkpoints
from trainer.checkpoint.run import Progress
from trainer.data import open_batches, prepare_data
from trainer.distributed import Launch, joined_world
from trainer.engine import start_engine
from trainer.model import build_model, build_model_shape, recipe_of
from trainer.pipeline import divide_layers
from trainer.run_directory import RunDirectory
from trainer.store import Files, read_manifest

Losses = list[float]


def go_on(config: dict[str, Any], steps: int, sabotage: str = "") -> Losses:
    """From where `checkpoint.resume` says, or from the beginning: saves at once, then trains and saves again. Returns
    the losses."""
    launch = Launch.from_environment()
    place = _place(config, launch)
    with joined_world(launch, place, seed=config["run"]["seed"]) as world:
        loaded = _loaded(config, launch.world)
        directory = RunDirectory.examine(loaded)
        prepared = prepare_data(loaded, builder=launch.rank == 0)
        batches = open_batches(loaded, prepared, place)
        model = build_model(loaded, prepared.tokenizer)
        checkpoints = Checkpoints(loaded, directory, world, batches.fingerprint, recipe_of(model))
        division = divide_layers(build_model_shape(loaded), loaded)
        engine = start_engine(model, loaded, world, division, blank=checkpoints.found)
        progress = checkpoints.restore(engine)
        batches.train.go_on_after(progress.step, progress.samples)
        if sabotage:
            _sabotage(engine, sabotage)
        checkpoints.save(engine, progress, {})
        losses = []
        for step in range(progress.step + 1, progress.step + steps + 1):
            batch = batches.train.at(step)
            world.seed_step(step)
            result = engine.train_step(batch)
            losses.append(sum(row[0] for row in engine.exchange([result.loss_sum])) / batch.tokens)
            progress = Progress(step, progress.tokens + batch.tokens, progress.samples + batch.samples)
        if steps:
            checkpoints.save(engine, progress, {})
        checkpoints.close()
        return losses


def _sabotage(engine: Any, how: str) -> None:
    raise ValueError(how)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, by `kind/name`; what is no tensor stands under "numbers"."""
    manifest, files = read_manifest(folder), Files(folder)
    state = {}
    for (name, kind), stored in manifest.tensors.items():
        whole = torch.full(stored.shape, 7, dtype=files.box(stored.boxes[0], stored.dtype).dtype)
        assert files.read(stored, (0,) * whole.ndim, whole) == whole.numel()
        state[f"{kind}/{name}"] = whole
    return state


def numbers_in(folder: Path) -> dict[str, Any]:
    return json.loads(json.dumps(dict(read_manifest(folder).numbers)))
