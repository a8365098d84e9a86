"""Jobs of the ranks in the checkpoint tests: train with the real loop, save, resume, and be killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed import PrefixStore

from launch.train import train
from tests.training_jobs import job_topology, load_job
from trainer import assembly, checkpoint_format
from trainer.assembly import assemble
from trainer.checkpoint import writer
from trainer.checkpoint_format import ChunkReader, read_manifest
from trainer.config import LoadedConfig
from trainer.distributed import Launch, World, joined_world
from trainer.errors import TesseraError, TrainingHalted
from trainer.fault_tolerance import StopAgreement, StopRequests
from trainer.loop import fit
from trainer.tracking import Row, Trackers

Losses = dict[int, float]
"""By step."""


class LossRecorder:
    """A tracker that keeps the training loss of every row."""

    def __init__(self) -> None:
        self.losses: Losses = {}

    def log(self, row: Row) -> None:
        if row["split"] == "train":
            self.losses[row["step"]] = row["loss"]

    def state(self) -> Mapping[str, str]:
        return {}

    def close(self, exit_status: int) -> None:
        pass


@dataclass(frozen=True)
class Job:
    """One attempt of a run."""

    config: dict[str, Any]
    last: int
    """Step to train to; the schedule of the learning rate is that of the configuration."""

    saves: Collection[int] = ()
    """Steps after which to save; an attempt that resumes at one of them also saves before its first step."""

    kill_event: int | None = None
    """Event of writing checkpoints at which the ranks `victims` are killed; see `kill_at_event`."""

    victims: Collection[int] = ()
    frozen: str = ""
    """Name of a weight that is not trained."""


def train_and_save(*arguments: Any) -> Losses:
    """Run one job, given by the fields of `Job`; return the losses, on rank 0."""
    job, launch = Job(*arguments), Launch.from_environment()
    with joined_world(launch, job_topology(job.config, launch), seed=job.config["run"]["seed"]) as world:
        return _run(job, launch, world)


def run_jobs(jobs: list[tuple[Any, ...]]) -> list[Any]:
    """Run several jobs in one world; return the losses, or the exit status and message of the error, of each."""
    launch, config = Launch.from_environment(), jobs[0][0]
    outcomes: list[Any] = []
    with joined_world(launch, job_topology(config, launch), seed=config["run"]["seed"]) as world:
        for i, arguments in enumerate(jobs):
            job_world = replace(world, store=PrefixStore(f"job-{i}", world.store))
            try:
                outcomes.append(_run(Job(*arguments), launch, job_world))
            except TesseraError as error:
                outcomes.append((error.exit_status, str(error)))
    return outcomes


def _run(job: Job, launch: Launch, world: World) -> Losses:
    with _frozen_weight(job.frozen):
        trainer = assemble(load_job(job.config, launch.world_size), world)
    trainer = replace(trainer, loaded=_with_last_step(trainer.loaded, job.last))
    checkpoints = trainer.checkpoints
    checkpoints.is_due = lambda step: step in job.saves  # type: ignore[method-assign]
    if job.kill_event is not None and launch.rank in job.victims:
        kill_at_event(job.kill_event)
    if trainer.progress.step in job.saves:
        checkpoints.save(trainer.engine, trainer.progress, {})
    recorder = LossRecorder()
    stop = StopAgreement(StopRequests(launch.rank), world, trainer.directory, final_step=job.last)
    fit(trainer, Trackers({"recorder": recorder} if world.is_rank_zero else {}), stop)
    return recorder.losses


def _with_last_step(loaded: LoadedConfig, last: int) -> LoadedConfig:
    """Change the length that the loop sees; every step is logged."""
    training = loaded.config.training.model_copy(update={"max_steps": last, "epochs": None, "log_every_steps": 1})
    return replace(loaded, config=loaded.config.model_copy(update={"training": training}))


@contextmanager
def _frozen_weight(name: str) -> Iterator[None]:
    """Build models with one weight that is not trained."""
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
    """Train as the command does, on a slow disk, until training halts; return the names of the checkpoints then."""
    write_chunks = writer.write_chunks

    def write_slowly(*arguments: Any) -> Any:
        time.sleep(2)
        return write_chunks(*arguments)

    writer.write_chunks = write_slowly
    launch = Launch.from_environment()
    try:
        train(load_job(config, launch.world_size), launch, StopRequests(launch.rank))
    except TrainingHalted:
        return sorted(path.name for path in (Path(config["run"]["output_dir"]) / "checkpoints").iterdir())
    raise AssertionError("training did not halt")


def train_disconnected(config: dict[str, Any]) -> Losses:
    """Train and save while the writer threads of the ranks cannot reach each other."""

    def fail(*_: Any) -> Any:
        raise RuntimeError("connection reset by peer")

    writer.CheckpointWriter.write = fail  # type: ignore[method-assign]
    return train_and_save(config, 4, (1, 2))


def kill_at_event(number: int) -> Callable[[], int]:
    """Kill this process at the given event of writing checkpoints, counted from 1.

    Before each event the process is about to write, sync, rename or delete a file or folder.

    Returns:
        A function that returns the number of events so far.
    """
    events = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal events
            events += 1
            if events == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    calls = [(os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree"), (checkpoint_format.files, "_write")]
    for holder, name in (*calls, (writer, "replace_text"), (writer, "write_chunks")):
        setattr(holder, name, counted(getattr(holder, name)))
    return lambda: events


def read_state(folder: Path) -> dict[str, torch.Tensor]:
    """Return every full tensor of a checkpoint, by `role/name`."""
    manifest, reader = read_manifest(folder), ChunkReader(folder)
    state = {}
    for (name, role), stored in manifest.tensors.items():
        tensor = torch.full(stored.shape, 7, dtype=checkpoint_format.DTYPES[stored.dtype])
        assert reader.read(stored, (0,) * tensor.ndim, tensor) == tensor.numel()
        state[f"{role}/{name}"] = tensor
    return state


def scalar_state_in(folder: Path) -> dict[str, Any]:
    """Return the non-tensor state of a checkpoint."""
    return dict(json.loads(json.dumps(dict(read_manifest(folder).scalar_state))))
