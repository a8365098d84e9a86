"""Process groups by axis, by product of axes, and parts of an axis."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup, Store

from trainer.compat.torch.process_groups import gloo_group
from trainer.distributed.phases import JOIN_TIMEOUT
from trainer.topology import AXES, Axis, Topology


class ProcessGroups:
    """The process groups of a joined world; torch's default group holds the ranks of one replica.

    torch requires all ranks to create the same groups in the same order, members or not. So every method that creates
    a group is collective: all ranks of the world must request the same groups in the same order, even those that do
    not use them. The groups of single axes of more than one rank are created at once, slowest axis first; all others on
    first use. A second request for a group returns the first one.
    """

    def __init__(self, topology: Topology, store: Store, timeout: timedelta = JOIN_TIMEOUT) -> None:
        """Create the groups of single axes. Collective: all ranks must call it.

        Args:
            topology: Topology of all replicas.
            store: Store of all replicas, in which the ranks of a group across replicas find each other.
            timeout: Timeout of collectives; `Phases` lowers it in the first step.
        """
        self._topology, self._store, self._timeout = topology, store, timeout
        self._replica = topology.inside_replica()
        self._inside: dict[tuple[tuple[int, ...], ...], ProcessGroup | None] = {}
        """By the groups that were created together, in ranks of the default group."""

        self._across: dict[tuple[int, ...], ProcessGroup] = {}
        """Groups across replicas, in ranks of the world."""

        for axis in AXES:
            if topology.size(axis) > 1:
                self.of(axis)

    def of(self, *axes: Axis) -> ProcessGroup:
        """Return this rank's group along an axis or a product of axes.

        Collective: all ranks of the world must call it on first use of `axes`. Groups across replicas work on host
        memory, by gloo.
        """
        if "replica" in axes and self._topology.replica > 1:
            return self._of_replicas(tuple(self._topology.ranks_of(*axes)))
        return _member(self._create(self._replica.groups_of(*axes)))

    def tensor_subgroup(self, size: int) -> ProcessGroup:
        """Return the group of `size` neighboring tensor ranks that this rank is in: those that share a key/value head.

        Collective: all ranks must call it on first use of `size`.
        """
        tensor_groups = self._replica.groups_of("tensor")
        parts = [ranks[i : i + size] for ranks in tensor_groups for i in range(0, len(ranks), size)]
        return _member(self._create(parts))

    def pipeline_subgroup(self, pipeline_ranks: tuple[int, ...]) -> ProcessGroup | None:
        """Return the group of `pipeline_ranks` with this rank's other coordinates; None on other pipeline ranks.

        Collective: all ranks must call it on first use of `pipeline_ranks`.
        """
        return self._create(
            [[ranks[index] for index in pipeline_ranks] for ranks in self._replica.groups_of("pipeline")]
        )

    def _of_replicas(self, ranks: tuple[int, ...]) -> ProcessGroup:
        if ranks not in self._across:
            store = PrefixStore(f"groups/{'-'.join(map(str, ranks))}", self._store)
            self._across[ranks] = gloo_group(store, ranks.index(self._topology.rank), len(ranks), self._timeout)
        return self._across[ranks]

    def _create(self, groups: Iterable[Sequence[int]]) -> ProcessGroup | None:
        """Create disjoint groups inside the replica and return the one of this rank."""
        key = tuple(map(tuple, groups))
        if key not in self._inside:
            created = [self._create_group(ranks) for ranks in key]
            memberships = [self._replica.rank in ranks for ranks in key]
            self._inside[key] = next(itertools.compress(created, memberships), None)
        return self._inside[key]

    def _create_group(self, ranks: tuple[int, ...]) -> ProcessGroup | None:
        if len(ranks) == self._replica.world_size:
            return dist.group.WORLD
        group: ProcessGroup = dist.new_group(list(ranks), timeout=self._timeout)
        return group


def _member(group: ProcessGroup | None) -> ProcessGroup:
    assert group is not None, "the groups along an axis partition the ranks"
    return group
