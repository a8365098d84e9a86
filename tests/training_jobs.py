"""What ranks run in the layout tests: training in our engine, or the reference in plain torch."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.configs import with_values
from tests.reference_optimizers import scheduled_learning_rates, torch_optimizer
from tools.parity.reference import ReferenceStep, load_reference_model, train_reference
from trainer.assembly import assemble
from trainer.config.load import LoadedConfig, check_config
from trainer.data import TrainBatches, open_batches, prepare_data
from trainer.data.batches import StepBatch
from trainer.distributed import Launch, World, joined_world, local_device
from trainer.engine.loss_normalization import LossNormalization
from trainer.engine.plain import PlainEngine
from trainer.loop import start_meter
from trainer.tasks import TaskLoss
from trainer.topology import Topology
from trainer.tracking import Meter

Curve = list[tuple[float, float]]
"""(loss, gradient norm before clipping) by step."""

Weights = dict[str, torch.Tensor]


def load_job(config: dict[str, Any], world: int) -> LoadedConfig:
    return check_config(config, world_size=world, device=local_device())


def job_topology(config: dict[str, Any], launch: Launch) -> Topology:
    parallel = config.get("parallel", {})
    tensor, pipeline = parallel.get("tensor", 1), parallel.get("pipeline", 1)
    return Topology.of(launch.world_size, launch.rank, tensor=tensor, pipeline=pipeline)


Outcome = tuple[Curve, Weights, float | None]
"""The curve, the final weights, and the held-out loss before training."""


def train(jobs: list[tuple[dict[str, Any], int]], sabotage: str = "") -> list[Outcome]:
    """Train in our engine for each (configuration, steps), in this rank's world."""
    launch = Launch.from_environment()
    topology = job_topology(jobs[0][0], launch)
    with joined_world(launch, topology, seed=jobs[0][0]["run"]["seed"]) as world:
        return [_train(config, steps, world, sabotage) for config, steps in jobs]


def _train(config: dict[str, Any], steps: int, world: World, sabotage: str) -> Outcome:
    if sabotage == "no clipping":
        config = with_values(config, deepspeed__gradient_clipping=0.0)
    trainer = assemble(load_job(config, world.topology.world_size), world)
    batches, engine = trainer.batches, trainer.engine
    before = engine.evaluate(batches.validation).loss if batches.validation else None
    curve = []
    for batch in batches.train.steps(1, steps):
        if sabotage == "other samples":
            batch = _with_other_samples(batch, world.topology.rank)
        with _sabotaged_objective(sabotage):
            result = engine.train_step(batch)
        total = sum(row[0] for row in engine.all_gather_scalars([result.loss_sum]))
        norm = float("nan") if result.grad_norm is None else float(result.grad_norm)
        curve.append((total / batch.tokens, norm))
    weights = {name: tensor.float().numpy().copy() for name, tensor in engine.full_weights()}
    return curve, weights, before


def _with_other_samples(batch: StepBatch, rank: int) -> StepBatch:
    """Shift the ids of every rank but rank 0."""
    micro_batches = tuple(
        replace(micro, inputs={**micro.inputs, "input_ids": micro.inputs["input_ids"] + rank})
        for micro in batch.micro_batches
    )
    return replace(batch, micro_batches=micro_batches)


@contextlib.contextmanager
def _sabotaged_objective(fault: str) -> Iterator[None]:
    """Break the objective of micro-batches, and not the reported loss; comparisons of layouts must detect it."""
    original, calls = LossNormalization.objective, itertools.count()

    def mean_of_means(normalization: LossNormalization, loss: TaskLoss) -> torch.Tensor:
        return loss.objective / (loss.target_losses != 0).sum() / 4

    def first_micro_batch_only(normalization: LossNormalization, loss: TaskLoss) -> torch.Tensor:
        return original(normalization, loss) * (next(calls) % 2 == 0)

    faults = {"mean of means": mean_of_means, "drop a micro-batch": first_micro_batch_only}
    LossNormalization.objective = faults.get(fault, original)  # type: ignore[method-assign]
    try:
        yield
    finally:
        LossNormalization.objective = original  # type: ignore[method-assign]


def train_bare(jobs: list[tuple[dict[str, Any], int]]) -> list[Outcome]:
    """Train the reference for each (configuration, steps): one process, the full global batch at once, no engine."""
    return [_train_bare(config, steps) for config, steps in jobs]


def _train_bare(config: dict[str, Any], steps: int) -> Outcome:
    config = {key: value for key, value in config.items() if key != "parallel"}
    loaded = load_job(config, 1)
    prepared = prepare_data(loaded)
    whole_batch = {**config["deepspeed"], "train_micro_batch_size_per_gpu": loaded.batch.batch_size}
    whole_batch.pop("gradient_accumulation_steps", None)
    loaded = load_job({**config, "deepspeed": whole_batch}, 1)
    batches = open_batches(loaded, prepared, Topology.of(1, 0))
    model = load_reference_model(loaded, prepared.tokenizer).train()
    optimizer = torch_optimizer(config, model)
    rates = scheduled_learning_rates(config, steps)

    def before_update(step: ReferenceStep) -> float | None:
        for group in optimizer.param_groups if rates else ():
            group["lr"] = rates[step.number - 1] * group["scale"]
        return config["deepspeed"]["gradient_clipping"] or None

    taken = train_reference(
        model,
        optimizer,
        (batches.train.batch_at(step).micro_batches for step in range(1, steps + 1)),
        loaded.config.training,
        before_update=before_update,
    )
    curve = [(step.loss, step.grad_norm) for step in taken]
    return curve, {name: p.detach().numpy() for name, p in model.named_parameters()}, None


def _start(config: dict[str, Any], world: World) -> tuple[TrainBatches, PlainEngine, Meter]:
    trainer = assemble(load_job(config, world.topology.world_size), world)
    return trainer.batches.train, cast("PlainEngine", trainer.engine), start_meter(trainer)


def learning_rates(jobs: list[tuple[dict[str, Any], int]]) -> list[list[float]]:
    """Return the learning rate of each step."""
    launch = Launch.from_environment()
    rates_of_jobs = []
    with joined_world(launch, job_topology(jobs[0][0], launch), seed=1) as world:
        for config, steps in jobs:
            batches, engine, _ = _start(config, world)
            rates_of_jobs.append([engine.train_step(b).learning_rate for b in batches.steps(1, steps)])
    return rates_of_jobs


def auxiliary_loss(config: dict[str, Any]) -> float:
    """Return the auxiliary loss of one step as the meter reports it: the mean over all micro-batches."""
    launch = Launch.from_environment()
    with joined_world(launch, job_topology(config, launch), seed=1) as world:
        batches, engine, meter = _start(config, world)
        batch = batches.batch_at(1)
        result = engine.train_step(batch)
        meter.add(batch.tokens)
        return float(meter.train_row(1, 0.0, result, batch.tokens)["auxiliary_loss"])


@dataclass
class EventCounts:
    """What happened during one step: host synchronisations and collectives, by whose frame issued them."""

    ours: Counter[str]
    theirs: Counter[str]


_OWNERS = ("trainer", "deepspeed", "transformers")
_COLLECTIVES = (
    *("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single"),
    *("all_gather", "all_gather_into_tensor", "all_gather_single", "all_gather_object", "all_gather_coalesced"),
    *("broadcast", "broadcast_object_list", "gather", "scatter", "all_to_all", "all_to_all_single"),
    *("barrier", "send", "recv", "batch_isend_irecv"),
)


def _owner() -> str:
    """Return the package whose code is innermost on the stack."""
    frame = inspect.currentframe().f_back.f_back  # type: ignore[union-attr]
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).split(".")[0]
        if package in _OWNERS:
            return package
        frame = frame.f_back
    return "other"


class _HostReadCounter(TorchDispatchMode):
    """Counts reads of device values by the host."""

    def __init__(self, counted: EventCounts) -> None:
        super().__init__()
        self._counted = counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "aten::_local_scalar_dense":
            (self._counted.ours if _owner() == "trainer" else self._counted.theirs)["host read"] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _counting(counted: EventCounts) -> Iterator[None]:
    originals = {name: getattr(dist, name) for name in _COLLECTIVES if hasattr(dist, name)}

    def wrap(name: str, function: Any) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            (counted.ours if _owner() == "trainer" else counted.theirs)[name] += 1
            return function(*args, **kwargs)

        return counting

    for name, function in originals.items():
        setattr(dist, name, wrap(name, function))
    try:
        with _HostReadCounter(counted):
            yield
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


def count_events(config: dict[str, Any]) -> tuple[EventCounts, EventCounts, EventCounts]:
    """Count events of a step that does not log, of one that does, and of the same step in a plain DeepSpeed loop."""
    launch = Launch.from_environment()
    quiet, logging, plain = (EventCounts(Counter(), Counter()) for _ in range(3))
    with joined_world(launch, Topology.of(launch.world_size, launch.rank), seed=1) as world:
        batches, engine, meter = _start(config, world)
        steps = meter.timed(batches.steps(1, 5))
        for counted in (None, None, quiet, logging):  # after evaluating, ZeRO 3 records the order of modules
            batch = next(steps)
            with _counting(counted) if counted is not None else contextlib.nullcontext():
                result = engine.train_step(batch)
                meter.add(batch.tokens)
                if counted is logging:
                    meter.train_row(3, 0.0, result, batch.tokens)
        batch = next(steps)
        with _counting(plain):
            for micro in batch.micro_batches:
                loss = engine.deepspeed_engine(micro.labels, **micro.inputs)
                engine.deepspeed_engine.backward(loss.objective)
                engine.deepspeed_engine.step()
        steps.close()
    return quiet, logging, plain


def shared_weights_after(config: dict[str, Any], steps: int) -> dict[str, Any]:
    """Return this rank's copies of the weights that several stages hold, after some steps."""
    launch = Launch.from_environment()
    with joined_world(launch, job_topology(config, launch), seed=1) as world:
        batches, engine, _ = _start(config, world)
        for batch in batches.steps(1, steps):
            engine.train_step(batch)
        shared = {name for name, ranks in engine.pipeline_ranks_of_weights.items() if len(ranks) > 1}
        held = (pair for own in engine.models for pair in own.named_parameters())
        return {name: parameter.detach().float().numpy() for name, parameter in held if name in shared}


def losses_with_dropout(config: dict[str, Any], steps: int) -> list[float]:
    """Return this rank's sum of the loss in each step."""
    launch = Launch.from_environment()
    with joined_world(launch, job_topology(config, launch), seed=config["run"]["seed"]) as world:
        batches, engine, _ = _start(config, world)
        return [float(engine.train_step(batch).loss_sum) for batch in batches.steps(1, steps)]
