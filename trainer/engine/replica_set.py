"""Which ranks hold replicas of the same weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from trainer.compat.deepspeed.zero3 import is_partitioned
from trainer.pipeline import local_parameters
from trainer.topology import Topology


class ReplicaSet(NamedTuple):
    """The axes along which other ranks hold the same elements as a rank. Sortable."""

    stages: tuple[int, ...]
    """Pipeline ranks with a replica; empty where only the rank's own stage holds the weight."""

    tensor: int
    """Number of neighboring tensor ranks with a replica, the rank itself included."""

    data: bool
    """Whether all data ranks have a replica."""

    def ranks(self, topology: Topology) -> tuple[int, ...]:
        """List the ranks with the same elements as the rank of `topology`, ascending; empty if that rank has none."""
        if self.stages and topology.stage not in self.stages:
            return ()
        first = topology.tensor_rank - topology.tensor_rank % self.tensor
        return tuple(
            (stage * topology.data + data_rank) * topology.tensor + tensor_rank
            for stage in self.stages or (topology.stage,)
            for data_rank in (range(topology.data) if self.data else (topology.data_rank,))
            for tensor_rank in range(first, first + self.tensor)
        )


def local_replica_sets(
    models: Sequence[nn.Module], stages: Mapping[str, tuple[int, ...]], topology: Topology
) -> Iterator[tuple[str, nn.Parameter, ReplicaSet]]:
    """Yield name, parameter and replica set of every weight on this rank; replicas have the same name on all ranks.

    Args:
        models: of this rank's stages.
        stages: pipeline ranks that hold each weight; empty without a pipeline.
        topology: of this rank.
    """
    for name, pieces in local_parameters(models).items():
        sharing = stages.get(name, ())
        for index, (parameter, shard) in enumerate(pieces):
            if shard is not None and shard.owner_only and not shard.owner:
                continue
            tensor = 1 if shard is None else shard.replica_count(topology.tensor)
            replica_set = ReplicaSet(sharing if len(sharing) > 1 else (), tensor, data=not is_partitioned(parameter))
            yield f"{name} (part {index})" if index else name, parameter, replica_set
