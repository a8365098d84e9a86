"""Position of a rank on the grid of parallel axes. Arithmetic only: no process group, no GPU."""

from __future__ import annotations

import itertools
import math
from dataclasses import KW_ONLY, dataclass, replace
from typing import Literal, get_args

Axis = Literal["replica", "pipeline", "data", "context", "expert", "tensor"]

AXES: tuple[Axis, ...] = get_args(Axis)
"""All axes, slowest first: ranks next to each other differ in their tensor coordinate, so that tensor-parallel traffic
stays inside a host. Restricted to (pipeline, data, tensor) the order is that of DeepSpeed's
``PipeModelDataParallelTopology``."""

SAMPLE_SHARING_AXES: tuple[Axis, ...] = ("pipeline", "context", "tensor")
"""Axes whose ranks process the same samples:

- pipeline: each stage computes other layers of the same micro-batches;
- context: each rank computes other positions of the same sequences;
- tensor: each rank computes other features (or heads) of the same activations.

The ranks of the other axes read different samples: data ranks and the ranks of expert parallelism, which exchange
tokens only inside expert layers, and replicas, which train independently between two synchronizations."""

GRADIENT_AXES: tuple[Axis, ...] = ("data", "context", "expert")
"""Axes over which the gradient of a full, non-expert weight is summed: their ranks hold the same weight and compute its
gradient from other tokens. Replicas are not among them: each updates its own weights."""


@dataclass(frozen=True)
class Topology:
    """The sizes of all axes, and the coordinates of one rank.

    The process groups made from it are in `trainer.distributed.groups`.
    """

    rank: int
    _: KW_ONLY
    replica: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        if min(map(self.size, AXES)) < 1:
            raise ValueError(f"every axis needs at least one rank: {self}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is outside a world of {self.world_size}")

    @classmethod
    def of(
        cls,
        world_size: int,
        rank: int,
        *,
        replica: int = 1,
        pipeline: int = 1,
        context: int = 1,
        expert: int = 1,
        tensor: int = 1,
    ) -> Topology:
        """Return the topology of `rank`; the data axis takes the remaining ranks.

        Raises:
            ValueError: the other axes do not divide `world_size`.
        """
        others = {"replica": replica, "pipeline": pipeline, "context": context, "expert": expert, "tensor": tensor}
        product = math.prod(others.values())
        if world_size % product:
            shape = " x ".join(f"{axis} {size}" for axis, size in others.items() if size > 1)
            raise ValueError(f"{world_size} ranks cannot be divided by {shape}")
        return cls(rank, data=world_size // product, **others)

    @property
    def world_size(self) -> int:
        """Number of ranks of all replicas."""
        return self.size(*AXES)

    @property
    def tensor_rank(self) -> int:
        """Coordinate along the tensor axis."""
        return self.coordinate("tensor")

    @property
    def data_rank(self) -> int:
        """Coordinate along the data axis."""
        return self.coordinate("data")

    @property
    def pipeline_rank(self) -> int:
        """Coordinate along the pipeline axis."""
        return self.coordinate("pipeline")

    def size(self, *axes: Axis) -> int:
        """Return the number of ranks along an axis, or along the product of several axes."""
        return math.prod(getattr(self, axis) for axis in axes)

    def coordinate(self, *axes: Axis) -> int:
        """Return the index of this rank along an axis, or along the product of several axes (slowest first)."""
        index = 0
        for axis in _in_order(axes):
            index = index * self.size(axis) + self.rank // self._stride(axis) % self.size(axis)
        return index

    def ranks_of(self, *axes: Axis) -> list[int]:
        """Return the ranks of the group along an axis or a product of axes, in the order of their coordinate."""
        axes = _in_order(axes)
        strides = [self._stride(axis) for axis in axes]
        first = self.rank - sum(self.coordinate(axis) * stride for axis, stride in zip(axes, strides, strict=True))
        indices = itertools.product(*(range(self.size(axis)) for axis in axes))
        return [first + sum(i * stride for i, stride in zip(index, strides, strict=True)) for index in indices]

    def groups_of(self, *axes: Axis) -> list[list[int]]:
        """Return all groups of ranks along an axis or a product of axes, in the order of their first rank."""
        groups = {tuple(replace(self, rank=rank).ranks_of(*axes)) for rank in range(self.world_size)}
        return sorted(map(list, groups))

    def shares_samples(self) -> tuple[Axis, ...]:
        """Return the axes of more than one rank whose ranks process the same samples; see `SAMPLE_SHARING_AXES`."""
        return tuple(axis for axis in SAMPLE_SHARING_AXES if self.size(axis) > 1)

    def inside_replica(self) -> Topology:
        """Return the topology of this rank's replica alone, with ranks counted from its first rank.

        This is the numbering of torch's default process group, which holds the ranks of one replica.
        """
        return replace(self, rank=self.rank % (self.world_size // self.replica), replica=1)

    def _stride(self, axis: Axis) -> int:
        """Distance in rank between neighbors along an axis."""
        return self.size(*AXES[AXES.index(axis) + 1 :])


def _in_order(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    return tuple(sorted(axes, key=AXES.index))
