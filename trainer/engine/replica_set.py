"""Sets of ranks that hold replicas of the same weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from trainer.compat.deepspeed.zero3 import is_partitioned
from trainer.pipeline import local_parameters
from trainer.topology import GRADIENT_AXES, Topology


class ReplicaSet(NamedTuple):
    """The axes along which other ranks hold the same elements as a rank. Sortable."""

    pipeline_ranks: tuple[int, ...]
    """Pipeline ranks with a replica; empty where only the rank's own coordinate holds the weight."""

    tensor: int
    """Number of neighboring tensor ranks with a replica, including the rank itself."""

    data: bool
    """Whether all ranks of `GRADIENT_AXES` have a replica."""

    def ranks(self, topology: Topology) -> tuple[int, ...]:
        """List the ranks with the same elements as the rank of `topology`, ascending; empty if that rank has none."""
        if self.pipeline_ranks and topology.pipeline_rank not in self.pipeline_ranks:
            return ()
        first = topology.tensor_rank - topology.tensor_rank % self.tensor
        pipeline_group = topology.ranks_of("pipeline")
        ranks: list[int] = []
        for pipeline_rank in self.pipeline_ranks or (topology.pipeline_rank,):
            tensor_ranks = replace(topology, rank=pipeline_group[pipeline_rank]).ranks_of("tensor")
            for rank in tensor_ranks[first : first + self.tensor]:
                ranks += replace(topology, rank=rank).ranks_of(*GRADIENT_AXES) if self.data else [rank]
        return tuple(sorted(ranks))


def local_replica_sets(
    models: Sequence[nn.Module], pipeline_ranks: Mapping[str, tuple[int, ...]], topology: Topology
) -> Iterator[tuple[str, nn.Parameter, ReplicaSet]]:
    """Yield name, parameter and replica set of every weight on this rank; replicas have the same name on all ranks.

    Args:
        models: of this rank's stages.
        pipeline_ranks: those that hold each weight; empty without a pipeline.
        topology: of this rank.
    """
    for name, pieces in local_parameters(models).items():
        sharing = pipeline_ranks.get(name, ())
        for index, (parameter, shard) in enumerate(pieces):
            if shard is not None and shard.owner_only and not shard.owner:
                continue
            tensor = 1 if shard is None else shard.replica_count(topology.tensor)
            replica_set = ReplicaSet(sharing if len(sharing) > 1 else (), tensor, data=not is_partitioned(parameter))
            yield f"{name} (part {index})" if index else name, parameter, replica_set
