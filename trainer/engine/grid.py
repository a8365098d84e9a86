"""The world as DeepSpeed asks for it."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from trainer.distributed import World
from trainer.topology import Axis


class Grid:
    """Answers DeepSpeed's questions to an `mpu` (Megatron's "model parallel unit"): which ranks hold other data, which
    hold other parts of the same weights. Every rank of the world must make one at the same time."""

    def __init__(self, world: World) -> None:
        self._topology = world.topology
        self._groups = {axis: self._group(world, axis) for axis in ("data", "tensor")}

    @staticmethod
    def _group(world: World, axis: Axis) -> Any:
        if axis in world.groups:
            return world.groups[axis] or dist.group.WORLD
        groups = {ranks[0]: dist.new_group(ranks) for ranks in world.topology.groups(axis)}
        return groups[world.topology.rank]

    def get_data_parallel_rank(self) -> int:
        return self._topology.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self._topology.data

    def get_data_parallel_group(self) -> Any:
        return self._groups["data"]

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self._topology.group("data")

    def get_model_parallel_rank(self) -> int:
        return self._topology.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self._topology.tensor

    def get_model_parallel_group(self) -> Any:
        return self._groups["tensor"]

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group
