"""What tests of tensor parallelism share: a world of one tensor group, a cut model, everybody's values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedModel

from trainer.distributed import Launch, World, joined_world
from trainer.tensor_parallel import TensorMapper, model_region, read_plan
from trainer.topology import Topology


@contextlib.contextmanager
def single_tensor_group() -> Iterator[World]:
    launch = Launch.from_environment()
    with joined_world(launch, Topology.of(launch.world_size, launch.rank, tensor=launch.world_size), seed=1) as world:
        yield world


def cut(model: PreTrainedModel, world: World, user: dict[str, str] | None = None, **options: Any) -> TensorMapper:
    place = world.topology
    plan = read_plan(model, user or {}, place.tensor, place.tensor_rank)
    region = model_region(model, world.groups.of("tensor"), place.tensor, place.tensor_rank)
    mapper = TensorMapper(model, plan, region, world.groups.tensor_subgroup, **options)
    mapper.shard_parameters(model.parameters())
    mapper.install()
    return mapper


def gather_from_ranks(value: Any) -> list[Any]:
    """Every rank's value, by rank."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
