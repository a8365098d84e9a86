"""Jobs of ranks in the tests of stop requests: train as the command does, receive a signal, resume."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore

from tests.commands import read_rows
from tests.configs import with_values
from tests.training_jobs import job_topology, load_job
from trainer.assembly import assemble
from trainer.checkpoint import writer
from trainer.distributed import Launch, World, joined_world
from trainer.errors import Preempted
from trainer.events import read_events
from trainer.fault_tolerance import StopAgreement, StopRequests
from trainer.fault_tolerance.run_lock import RunLock
from trainer.loop import fit
from trainer.tracking.interface import Trackers
from trainer.tracking.jsonl import JsonLines


@dataclass(frozen=True)
class Signal:
    """A signal that one rank sends itself."""

    rank: int
    number: signal.Signals
    during: str
    """`training` (at a random moment), `save` or `evaluation` (within the first one after step 0), `step 14`."""


@dataclass(frozen=True)
class Stopped:
    """Record of one rank of a run that was stopped and resumed."""

    step: int
    """Step after which it was stopped; -1 if it finished instead."""

    message: str
    evaluated: tuple[int, ...]
    saved: tuple[str, ...]
    events: tuple[dict[str, Any], ...]
    losses: dict[int, float]
    """Losses by step, of both attempts."""


def stop_and_resume(config: dict[str, Any], signals: list[Signal], seed: int) -> tuple[dict[int, float], list[Stopped]]:
    """Return the losses of an unbroken run, and for each signal the outcome of a run that received it, in one world.

    Each rank sleeps for a random time before each step, so that ranks are far apart.
    """
    launch = Launch.from_environment()
    folder = Path(config["run"]["output_dir"])
    with joined_world(launch, job_topology(config, launch), seed=config["run"]["seed"]) as world:
        _attempt(config, folder / "unbroken", world, "unbroken", None, seed)
        found = []
        for number, signal_plan in enumerate(signals):
            run = folder / str(number)
            step, message, evaluated = _attempt(config, run, world, f"{number}/stopped", signal_plan, seed + number)
            saved = tuple(sorted(path.name for path in (run / "checkpoints").glob("step-*")))
            _attempt(config, run, world, f"{number}/resumed", None, seed)
            events = tuple(read_events(run))
            found.append(Stopped(step, message, evaluated, saved, events, _losses(run)))
        return _losses(folder / "unbroken"), found


def _losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_rows(run) if row["split"] == "train"}


def _attempt(
    config: dict[str, Any], run: Path, world: World, name: str, signal_plan: Signal | None, seed: int
) -> tuple[int, str, tuple[int, ...]]:
    """Run one attempt. Return the step after which it stopped, the message, and the steps after which it evaluated."""
    loaded = load_job(with_values(config, run__output_dir=str(run)), world.topology.world_size)
    world = replace(world, store=PrefixStore(name, world.store))
    trainer = assemble(loaded, world)
    directory, rank = trainer.directory, world.topology.rank
    directory.path.mkdir(parents=True, exist_ok=True)
    requests = StopRequests(rank)
    requests.install()
    requests.begin_run(directory, RunLock())
    draw = random.Random(seed * 1000 + rank)
    stop = _DelayedAgreement(requests, world, directory, loaded.steps, draw)
    trackers = _EvaluationCounter({"jsonl": JsonLines(directory.metrics)} if world.is_rank_zero else {})
    stopped, message = -1, ""
    with _sending(signal_plan if signal_plan and signal_plan.rank == rank else None, trainer.engine, draw):
        try:
            fit(trainer, trackers, stop)
        except Preempted as error:
            stopped, message = trainer.progress.step, str(error)
    requests.release()
    return stopped, message, tuple(trackers.steps)


class _DelayedAgreement(StopAgreement):
    """Sleeps before each step."""

    def __init__(self, requests: StopRequests, world: World, directory: Any, final_step: int, draw: Any) -> None:
        super().__init__(requests, world, directory, final_step=final_step)
        self._draw = draw

    def before_step(self, step: int) -> None:
        time.sleep(self._draw.random() * 0.005)
        super().before_step(step)


class _EvaluationCounter(Trackers):
    """Counts evaluations on every rank."""

    def __init__(self, trackers: dict[str, Any]) -> None:
        super().__init__(trackers)
        self.steps: list[int] = []

    def log(self, row: dict[str, Any]) -> None:
        if row["split"] == "validation":
            self.steps.append(row["step"])
        super().log(row)


@contextmanager
def _sending(signal_plan: Signal | None, engine: Any, draw: random.Random) -> Iterator[None]:
    """Send the signal at its moment."""
    if signal_plan is None:
        yield
        return
    kill: Callable[[], None] = lambda: os.kill(os.getpid(), signal_plan.number)  # noqa: E731
    train_step, evaluate, write_chunks = engine.train_step, engine.evaluate, writer.write_chunks
    begun, steps = threading.Event(), itertools.count(1)

    def first_step(batch: Any, **values: Any) -> Any:
        if not begun.is_set():
            begun.set()
            if signal_plan.during == "training":
                threading.Timer(draw.random() * 0.2, kill).start()
        if signal_plan.during == f"step {next(steps)}":
            kill()
            time.sleep(0.1)
        return train_step(batch, **values)

    def during(function: Any) -> Any:
        def calls(*arguments: Any) -> Any:
            if begun.is_set():
                kill()
                time.sleep(0.1)
            return function(*arguments)

        return calls

    engine.train_step = first_step
    if signal_plan.during == "evaluation":
        engine.evaluate = during(evaluate)
    elif signal_plan.during == "save":
        writer.write_chunks = during(write_chunks)
    yield
    writer.write_chunks = write_chunks
