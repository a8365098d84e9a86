"""The replica axis: replicas train independently through the real engine, on real process groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests import training_jobs
from tests.configs import with_values
from tests.harness import run_ranks
from trainer.assembly import assemble
from trainer.distributed import Launch, joined_world
from trainer.engine.mpu import ModelParallelUnit
from trainer.topology import Topology

STEPS = 3
SEEDS = (11, 12)
"""By replica: another seed means other initial weights and other samples."""

Replica = tuple[training_jobs.Curve, training_jobs.Weights, training_jobs.Weights, list[int], float]
"""The curve, the final weights, their mean over replicas, the ranks that DeepSpeed averages over, a random number."""


def train_replica(config: dict[str, Any], replicas: int) -> Replica:
    launch, parallel = Launch.from_environment(), config.get("parallel", {})
    topology = Topology.of(
        launch.world_size,
        launch.rank,
        replica=replicas,
        pipeline=parallel.get("pipeline", 1),
        tensor=parallel.get("tensor", 1),
    )
    config = with_values(config, run__seed=SEEDS[topology.coordinate("replica")])
    with joined_world(launch, topology, seed=SEEDS[0]) as world:
        loaded = training_jobs.load_job(config, world.topology.world_size)
        trainer = assemble(loaded, world)
        engine = trainer.engine
        curve = []
        for step, batch in enumerate(trainer.batches.train.steps(1, STEPS), start=1):
            world.seed_step(step)
            result = engine.train_step(batch)
            assert result.grad_norm is not None
            loss = sum(row[0] for row in engine.all_gather_scalars([result.loss_sum])) / batch.tokens
            curve.append((loss, float(result.grad_norm)))
        weights = {name: tensor.float().clone() for name, tensor in engine.full_weights()}
        averaged = {name: tensor.clone() for name, tensor in weights.items()}
        for tensor in averaged.values():
            dist.all_reduce(tensor.div_(replicas), group=world.groups.of("replica"))
        data_ranks = dist.get_process_group_ranks(ModelParallelUnit(world).get_data_parallel_group())
        world.seed_step(STEPS)
        draw = float(torch.rand(()))
    return curve, _arrays(weights), _arrays(averaged), data_ranks, draw


def _arrays(weights: dict[str, torch.Tensor]) -> training_jobs.Weights:
    return {name: tensor.numpy() for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("parallel", "stage"),
    [({}, 1), ({}, 3), ({"tensor": 2}, 0), ({"pipeline": 2}, 1)],
    ids=["data-zero1", "data-zero3", "tensor", "pipeline"],
)
def test_two_replicas_train_as_two_single_processes_do(
    parallel: dict[str, int], stage: int, tiny: dict[str, Any]
) -> None:
    config = with_values(tiny, parallel=parallel, deepspeed__zero_optimization={"stage": stage})
    single = with_values(tiny, deepspeed__train_micro_batch_size_per_gpu=8)
    expected = [
        run_ranks(training_jobs.train, 1, [(with_values(single, run__seed=seed), STEPS)])[0][0] for seed in SEEDS
    ]
    ranks = run_ranks(train_replica, 4, config, 2)
    for rank, (curve, weights, averaged, data_ranks, _) in enumerate(ranks):
        expected_curve, expected_weights, _ = expected[rank // 2]
        np.testing.assert_allclose(curve, expected_curve, rtol=2e-5)
        for name, array in expected_weights.items():
            np.testing.assert_allclose(weights[name], array, atol=2e-5, err_msg=name)
            mean = (expected[0][1][name] + expected[1][1][name]) / 2
            np.testing.assert_allclose(averaged[name], mean, atol=2e-5, err_msg=name)
        assert len(data_ranks) == (1 if parallel else 2), "gradients are averaged inside a replica only"
    assert abs(expected[0][0][0][0] - expected[1][0][0][0]) > 1e-3, "the replicas read other samples"
    draws = [draw for *_, draw in ranks]
    assert draws[0] != draws[2], "replicas draw other random numbers"
