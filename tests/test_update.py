"""The update mode seam: a mode that averages two engines, against the same arithmetic in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.configs import tiny_config, with_values
from tests.harness import run_ranks
from tests.training_jobs import job_topology, load_job
from trainer.checkpoint_format import WEIGHT
from trainer.data import TrainBatches, open_batches, prepare_data
from trainer.distributed import Launch, World, joined_world
from trainer.engine import Engine, StepResult, build_engine
from trainer.model import build_model, initialize_weights
from trainer.update import Synchronous

REPLICAS, STEPS, EVERY_STEPS, RATE = 2, 4, 2, 0.5

Weights = dict[str, np.ndarray]


class Averaging:
    """Averages the master weights of all engines that it wraps, in one process, after every `every_steps` steps."""

    def __init__(self, every_steps: int) -> None:
        self.every_steps = every_steps
        self.engines: list[AveragedEngine] = []

    def wrap(self, engine: Engine, world: World) -> Engine:
        self.engines.append(AveragedEngine(engine, self))
        return self.engines[-1]  # type: ignore[return-value]

    @torch.no_grad()
    def average_if_due(self) -> None:
        steps = {engine.steps for engine in self.engines}
        if len(steps) > 1 or steps.pop() % self.every_steps:
            return
        for chunks in zip(*(engine.state.local_chunks() for engine in self.engines), strict=True):
            if chunks[0].role == WEIGHT:
                mean = torch.stack([chunk.tensor for chunk in chunks]).mean(0)
                for chunk in chunks:
                    chunk.tensor.copy_(mean)
        for engine in self.engines:
            engine.state.sync_model_weights()


class AveragedEngine:
    def __init__(self, engine: Engine, mode: Averaging) -> None:
        self._engine, self._mode, self.steps = engine, mode, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def train_step(self, *arguments: Any, **options: Any) -> StepResult:
        result = self._engine.train_step(*arguments, **options)
        self.steps += 1
        self._mode.average_if_due()
        return result


@pytest.fixture
def base(corpus: Path, shared_cache: Path, tmp_path: Path) -> dict[str, Any]:
    return with_values(
        tiny_config(corpus, shared_cache, tmp_path / "run"),
        data__validation=[],
        deepspeed__train_micro_batch_size_per_gpu=8,
        deepspeed__gradient_clipping=0.0,
        deepspeed__optimizer={"type": "SGD", "params": {"lr": RATE}},
    )


def batch_of(batches: TrainBatches, step: int, replica: int) -> Any:
    """Another global batch for each replica."""
    return batches.batch_at((step - 1) * REPLICAS + replica + 1)


def train_replicas(config: dict[str, Any], every_steps: int) -> list[Weights]:
    """Train replicas in turns and return the weights of each."""
    launch = Launch.from_environment()
    with joined_world(launch, job_topology(config, launch), seed=1) as world:
        loaded = load_job(config, launch.world_size)
        prepared = prepare_data(loaded, launch, world.store)
        batches = open_batches(loaded, prepared, world.topology).train
        mode = Averaging(every_steps)
        engines = [
            mode.wrap(build_engine(build_model(loaded, prepared.tokenizer), loaded, world), world)
            for _ in range(REPLICAS)
        ]
        for step in range(1, STEPS + 1):
            for replica, engine in enumerate(engines):
                engine.train_step(batch_of(batches, step, replica))
        return [{name: w.float().numpy().copy() for name, w in engine.full_weights()} for engine in engines]


def average_by_hand(config: dict[str, Any]) -> Weights:
    """SGD and averaging in plain torch: w <- w - rate * gradient, and every `EVERY_STEPS` steps the mean of all w."""
    loaded = load_job(config, 1)
    prepared = prepare_data(loaded)
    launch = Launch()
    batches = open_batches(loaded, prepared, job_topology(config, launch)).train
    models = [build_model(loaded, prepared.tokenizer) for _ in range(REPLICAS)]
    for model in models:
        initialize_weights(model, loaded.config.run.seed)
        model.train()
    for step in range(1, STEPS + 1):
        for replica, model in enumerate(models):
            (micro,) = batch_of(batches, step, replica).micro_batches
            logits = model(**micro.inputs).logits
            loss = F.cross_entropy(logits.flatten(0, 1), micro.labels.flatten(), ignore_index=-100)
            parameters = dict(model.named_parameters())
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            with torch.no_grad():
                for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                    parameter -= RATE * gradient
        if step % EVERY_STEPS == 0:
            with torch.no_grad():
                for replicas in zip(*(model.parameters() for model in models), strict=True):
                    mean = sum(replicas) / REPLICAS
                    for parameter in replicas:
                        parameter.copy_(mean)
    return {name: parameter.detach().numpy() for name, parameter in models[0].named_parameters()}


@pytest.mark.parametrize(
    ("values", "tolerance"),
    [
        ({"deepspeed__zero_optimization": {"stage": 0}}, 2e-5),
        ({"deepspeed__zero_optimization": {"stage": 1}}, 2e-5),
        ({"deepspeed__zero_optimization": {"stage": 3}}, 2e-5),
        ({"deepspeed__zero_optimization": {"stage": 1}, "deepspeed__bf16": {"enabled": True}}, 1e-2),
    ],
    ids=["zero0", "zero1", "zero3", "zero1-bf16"],
)
def test_averaging_mode_equals_hand_arithmetic(values: dict[str, Any], tolerance: float, base: dict[str, Any]) -> None:
    (expected,) = run_ranks(average_by_hand, 1, base)
    config = with_values(base, **values)
    first, second = run_ranks(train_replicas, 1, config, EVERY_STEPS)[0]
    assert first.keys() == second.keys() == expected.keys()
    for name, weight in expected.items():
        assert np.array_equal(first[name], second[name]), name
        np.testing.assert_allclose(first[name], weight, atol=tolerance, rtol=0, err_msg=name)


def test_comparison_detects_missing_average(base: dict[str, Any]) -> None:
    (expected,) = run_ranks(average_by_hand, 1, base)
    first, second = run_ranks(train_replicas, 1, base, STEPS + 1)[0]
    name = "model.embed_tokens.weight"
    for weights in (first, second):
        assert np.abs(weights[name] - expected[name]).max() > 1e-2
    assert not np.array_equal(first[name], second[name])


@pytest.mark.fast
def test_synchronous_mode_uses_engine_as_it_is() -> None:
    engine, world = object(), object()
    assert Synchronous().wrap(engine, world) is engine  # type: ignore[arg-type]
