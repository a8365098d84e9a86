"""What ranks do in the checkpoint tests: train, save, go on from what another layout has saved, and die."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from launch.train import train
from tests.training_jobs import job_topology, load_job
from trainer import assembly, checkpoint_format
from trainer.assembly import assemble
from trainer.checkpoint import writer
from trainer.checkpoint_format import ChunkReader, read_manifest
from trainer.distributed import Launch, World, joined_world
from trainer.errors import TesseraError, TrainingHalted
from trainer.fault_tolerance import StopRequests

Losses = dict[int, float]
"""By step."""


def train_and_save(
    config: dict[str, Any],
    last: int,
    saves: tuple[int, ...] = (),
    kill: int | None = None,
    victims: Any = (),
    frozen: str = "",
) -> Losses:
    """Trains up to step `last`, from where `checkpoint.resume` says, or from the beginning. Returns the losses.

    Args:
        saves: steps behind which the state is saved; if the first of them is where the run begins, before any other.
        frozen: name of a weight that is not trained.
        kill: at this event of writing a checkpoint, counted from 1, dies a rank of `victims`; see `kill_at_event`.
    """
    launch = Launch.from_environment()
    with joined_world(launch, job_topology(config, launch), seed=config["run"]["seed"]) as world:
        return _train_and_save(launch, world, config, last, saves, kill, victims, frozen)


def run_jobs(jobs: list[tuple[Any, ...]]) -> list[Any]:
    """What `train_and_save` returns for each job, or the status and message of the error raised; all in one world."""
    launch = Launch.from_environment()
    config = jobs[0][0]
    found: list[Any] = []
    with joined_world(launch, job_topology(config, launch), seed=config["run"]["seed"]) as world:
        for job in jobs:
            try:
                found.append(_train_and_save(launch, world, *job))
            except TesseraError as error:
                found.append((error.exit_status, str(error)))
    return found


def _train_and_save(
    launch: Launch, world: World, config: dict[str, Any], last: int, saves: tuple[int, ...] = (),
    kill: int | None = None, victims: Any = (), frozen: str = "",
) -> Losses:  # fmt: skip
    with _frozen(frozen):
        trainer = assemble(load_job(config, launch.world_size), world)
    engine, checkpoints, progress, batches = trainer.engine, trainer.checkpoints, trainer.progress, trainer.batches
    if kill is not None and launch.rank in victims:
        kill_at_event(kill)
    losses: Losses = {}
    if progress.step in saves:
        checkpoints.save(engine, progress, {})
    for step in range(progress.step + 1, last + 1):
        batch = batches.train.batch_at(step)
        world.seed_step(step)
        result = engine.train_step(batch)
        losses[step] = sum(row[0] for row in engine.all_gather_scalars([result.loss_sum])) / batch.tokens
        progress.advance(batch.tokens, batch.samples)
        if step in saves:
            checkpoints.save(engine, progress, {"train": losses[step]})
    checkpoints.close()
    return losses


@contextmanager
def _frozen(name: str) -> Iterator[None]:
    """Within, models are built with one weight that is not trained."""
    build_model = assembly.build_model

    def build(*arguments: Any) -> Any:
        model = build_model(*arguments)
        if name:
            model.get_parameter(name).requires_grad_(False)
        return model

    assembly.build_model = build
    yield
    assembly.build_model = build_model


def train_until_halted(config: dict[str, Any]) -> list[str]:
    """Trains as the command does, on a slow disk, until training halts; what the run's checkpoints are just then."""
    write_items_file = writer.write_items_file

    def slowly(*arguments: Any) -> Any:
        time.sleep(2)
        return write_items_file(*arguments)

    writer.write_items_file = slowly
    launch = Launch.from_environment()
    try:
        train(load_job(config, launch.world_size), launch, StopRequests(launch.rank))
    except TrainingHalted:
        return sorted(path.name for path in (Path(config["run"]["output_dir"]) / "checkpoints").iterdir())
    raise AssertionError("it did not halt")


def train_disconnected(config: dict[str, Any]) -> Losses:
    """Trains and saves while the ranks' writing threads cannot reach each other."""

    def write(*_: Any) -> Any:
        raise RuntimeError("connection reset by peer")

    writer.CheckpointWriter.write = write  # type: ignore[method-assign]
    return train_and_save(config, 4, (1, 2))


def kill_at_event(at: int) -> Callable[[], int]:
    """Lets this process be killed at the `at`-th time that it is about to write, sync, rename or delete something of a
    checkpoint. Returns what tells how often that has been."""
    events = 0

    def counted(function: Any) -> Any:
        def calls(*args: Any, **kwargs: Any) -> Any:
            nonlocal events
            events += 1
            if events == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return calls

    calls = [(os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree"), (checkpoint_format.files, "_write")]
    for holder, name in (*calls, (writer, "replace_text"), (writer, "write_items_file")):
        setattr(holder, name, counted(getattr(holder, name)))
    return lambda: events


def read_state(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, by `kind/name`."""
    manifest, files = read_manifest(folder), ChunkReader(folder)
    state = {}
    for (name, kind), stored in manifest.tensors.items():
        whole = torch.full(stored.shape, 7, dtype=checkpoint_format.DTYPES[stored.dtype])
        assert files.read(stored, (0,) * whole.ndim, whole) == whole.numel()
        state[f"{kind}/{name}"] = whole
    return state


def scalar_state_in(folder: Path) -> dict[str, Any]:
    """What is no tensor, of the engine."""
    return dict(json.loads(json.dumps(dict(read_manifest(folder).scalar_state))))
