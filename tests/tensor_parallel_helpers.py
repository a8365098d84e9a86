"""Helpers for tests of tensor parallelism: a world of one tensor group, a sharded model, values of all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedModel

from trainer.distributed import Launch, World, joined_world
from trainer.tensor_parallel import TensorMapper, model_region, resolve_plan
from trainer.topology import Topology


@contextlib.contextmanager
def single_tensor_group() -> Iterator[World]:
    """Join a world whose ranks are one tensor group. Collective: all ranks must call it."""
    launch = Launch.from_environment()
    with joined_world(launch, Topology.of(launch.world_size, launch.rank, tensor=launch.world_size), seed=1) as world:
        yield world


def shard_model(
    model: PreTrainedModel, world: World, user: dict[str, str] | None = None, **options: Any
) -> TensorMapper:
    """Shard a full model by its plan and `user`, and return the mapper. Collective: all ranks must call it."""
    topology = world.topology
    plan = resolve_plan(model, user or {}, topology.tensor, topology.tensor_rank)
    region = model_region(model, world.groups.of("tensor"), topology.tensor, topology.tensor_rank)
    mapper = TensorMapper(model, plan, region, world.groups.tensor_subgroup, **options)
    mapper.shard_parameters(model.parameters())
    mapper.install()
    return mapper


def gather_from_ranks(value: Any) -> list[Any]:
    """Return the value of every rank, in rank order. Collective: all ranks must call it."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
