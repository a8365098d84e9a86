"""The topology as DeepSpeed's `mpu` (Megatron's "model parallel unit")."""

from __future__ import annotations

from torch.distributed import ProcessGroup

from trainer.distributed import World
from trainer.topology import GRADIENT_AXES


class ModelParallelUnit:
    """DeepSpeed's `mpu`: process groups of one replica, along the axes that sum gradients and along the tensor axis.

    DeepSpeed averages gradients over the data-parallel group and partitions optimizer state, gradients and weights over
    it; it reduces the gradient norm over the model-parallel group. Collective: all ranks must create theirs
    together.
    """

    def __init__(self, world: World) -> None:
        self._topology = world.topology
        self._data_group = world.groups.of(*GRADIENT_AXES)
        self._tensor_group = world.groups.of("tensor")

    def get_data_parallel_rank(self) -> int:
        """Coordinate of this rank in the data-parallel group."""
        return self._topology.coordinate(*GRADIENT_AXES)

    def get_data_parallel_world_size(self) -> int:
        """Size of the data-parallel group."""
        return self._topology.size(*GRADIENT_AXES)

    def get_data_parallel_group(self) -> ProcessGroup:
        """Ranks that hold the same weights and compute their gradients from other tokens."""
        return self._data_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Ranks of the data-parallel group, as torch's default group numbers them."""
        return self._topology.ranks_of(*GRADIENT_AXES)

    def get_model_parallel_rank(self) -> int:
        """Coordinate of this rank along the tensor axis."""
        return self._topology.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        """Size of the tensor axis."""
        return self._topology.tensor

    def get_model_parallel_group(self) -> ProcessGroup:
        """Ranks that hold other shards of the same weights."""
        return self._tensor_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group
