"""Where a rank stands on the (pipeline, data, tensor) grid. Arithmetic only: no process group, no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Axis = Literal["pipeline", "data", "tensor"]


@dataclass(frozen=True)
class Topology:
    """The place of one rank. Slowest axis first: pipeline, data, tensor.

    The order is that of DeepSpeed's ``PipeModelDataParallelTopology``: neighbours in rank differ in
    their tensor coordinate, so that the traffic of tensor parallelism stays inside a host.
    """

    rank: int
    pipeline: int = 1
    data: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        if min(self.pipeline, self.data, self.tensor) < 1:
            raise ValueError(f"every axis needs at least one rank: {self}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is outside a world of {self.world_size}")

    @classmethod
    def of(cls, world: int, rank: int, *, pipeline: int = 1, tensor: int = 1) -> Topology:
        """The place of `rank` in a world of `world` ranks; the data axis takes what the others leave."""
        if world % (pipeline * tensor):
            raise ValueError(f"{world} ranks cannot be divided by tensor {tensor} x pipeline {pipeline}")
        return cls(rank=rank, pipeline=pipeline, data=world // (pipeline * tensor), tensor=tensor)

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data * self.tensor

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor % self.data

    @property
    def stage(self) -> int:
        return self.rank // (self.tensor * self.data)

    def groups(self, axis: Axis) -> list[list[int]]:
        """All groups of ranks that differ only in `axis`, in ascending order of their first rank."""
        stride = {"tensor": 1, "data": self.tensor, "pipeline": self.tensor * self.data}[axis]
        size = {"tensor": self.tensor, "data": self.data, "pipeline": self.pipeline}[axis]
        firsts = [rank for rank in range(self.world_size) if rank // stride % size == 0]
        return [[first + stride * index for index in range(size)] for first in firsts]

    def group(self, axis: Axis) -> list[int]:
        """The ranks of this rank's own group along `axis`."""
        return next(group for group in self.groups(axis) if self.rank in group)
