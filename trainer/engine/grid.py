"""The world as DeepSpeed asks for it."""

from __future__ import annotations

import torch.distributed as dist

from trainer.distributed import World
from trainer.topology import Axis


class Grid:
    """DeepSpeed's `mpu` (Megatron's "model parallel unit"): process groups along the data and the tensor axis.

    A group of one rank is created where the world has none. Collective: all ranks must create their grids together.
    """

    def __init__(self, world: World) -> None:
        self._topology = world.topology
        self._groups = {axis: self._group(world, axis) for axis in ("data", "tensor")}

    @staticmethod
    def _group(world: World, axis: Axis) -> dist.ProcessGroup:
        if axis in world.groups:
            group = world.groups[axis] or dist.group.WORLD
            assert isinstance(group, dist.ProcessGroup)
            return group
        groups: dict[int, dist.ProcessGroup] = {
            ranks[0]: dist.new_group(ranks) for ranks in world.topology.groups(axis)
        }
        return groups[world.topology.rank]

    def get_data_parallel_rank(self) -> int:
        """Coordinate of this rank along the data axis."""
        return self._topology.data_rank

    def get_data_parallel_world_size(self) -> int:
        """Size of the data axis."""
        return self._topology.data

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same weights and read other samples."""
        return self._groups["data"]

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of the data-parallel group."""
        return self._topology.group("data")

    def get_model_parallel_rank(self) -> int:
        """Coordinate of this rank along the tensor axis."""
        return self._topology.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        """Size of the tensor axis."""
        return self._topology.tensor

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that hold other shards of the same weights."""
        return self._groups["tensor"]

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group
