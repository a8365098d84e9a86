"""Bitwise comparison of replicated weights between ranks (`training.verify_every_steps`).

The ranks that hold replicas of a weight follow from the shard record along the tensor axis, from the stage assignment
along the pipeline axis, and from the optimizer along the data axis: under ZeRO 0 to 2 all data ranks hold every weight,
under ZeRO 3 each holds its own partition. Buffers are not compared: a model may compute them from each rank's samples.
"""

from __future__ import annotations

import logging
import socket
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.compat.deepspeed.layouts.base import OptimizerLayout
from trainer.compat.deepspeed.zero3 import local_elements
from trainer.distributed import World
from trainer.engine.replica_report import MAX_REPORTED, Hash, Mismatch, describe_mismatches
from trainer.engine.replica_set import ReplicaSet, local_replica_sets
from trainer.engine.tensor_hash import hash_bits
from trainer.errors import ReplicasDifferError
from trainer.topology import GRADIENT_AXES

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Replica:
    """Elements of a weight on this rank that other ranks also hold."""

    parameter: nn.Parameter
    elements: Tensor
    """Flat."""

    parameter_offset: int
    """First of the elements in the flattened parameter; 0 but under ZeRO 3."""


class _MasterFragment(NamedTuple):
    """Contiguous elements of a flattened weight of which a rank has the fp32 master weights."""

    parameter_offset: int
    length: int
    hash: Hash
    """Hash of the master weights, cast to the weight's type."""

    def contradicts(self, replica: _Replica) -> bool:
        """Return whether a replica has other bits than the master weights, if it has these elements."""
        start = self.parameter_offset - replica.parameter_offset
        if start < 0 or start + self.length > replica.elements.numel():  # ZeRO 3: another data rank's partition
            return False
        return _hash(replica.elements[start : start + self.length]) != self.hash


class ReplicaVerifier:
    """Compares the hashes of all replicas.

    In a step that verifies, replicas are compared after the update. Where updates write weights from master weights,
    they are also compared before it: the update would overwrite a corrupted replica, which has corrupted the gradient
    already.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        pipeline_ranks: Mapping[str, tuple[int, ...]],
        layout: OptimizerLayout,
        world: World,
    ) -> None:
        """Agree on the replica sets of all ranks. Collective: all ranks must call it.

        Args:
            models: of this rank's stages.
            pipeline_ranks: those that hold each weight; empty without a pipeline.
            layout: of the optimizer.
            world: of this rank.
        """
        self._layout, self._world = layout, world
        self._last_verified: int | None = None
        self._local: dict[ReplicaSet, dict[str, nn.Parameter]] = defaultdict(dict)
        for name, parameter, replica_set in local_replica_sets(models, pipeline_ranks, world.topology):
            if len(replica_set.ranks(world.topology)) > 1:
                self._local[replica_set][name] = parameter
        gathered: list[list[ReplicaSet]] = [[]] * world.topology.world_size
        dist.all_gather_object(gathered, sorted(self._local))
        self._replica_sets = sorted({ReplicaSet(*fields) for replica_sets in gathered for fields in replica_sets})
        """Those of all ranks, in the same order on all ranks."""

        topologies = [replace(world.topology, rank=rank) for rank in range(world.topology.world_size)]
        self._groups = {
            replica_set: sorted({ranks for topology in topologies if (ranks := replica_set.ranks(topology))})
            for replica_set in self._replica_sets
        }
        if not self._replica_sets:
            log.warning("training.verify_every_steps: no weight is replicated, nothing is compared")

    def verify_before_update(self, step: int) -> None:
        """Compare replicas between the backward pass and the update, if the update would hide a difference.

        Collective: all ranks must call it.

        Raises:
            ReplicasDifferError: see `verify`.
        """
        if self._layout.has_master_weights:
            self._compare(step)

    def verify(self, step: int) -> None:
        """Compare replicas after the update. Collective: all ranks must call it.

        One all-gather of 16 bytes per replica set, of which there are few.

        Raises:
            ReplicasDifferError: on all ranks alike, naming the ranks whose replicas are wrong, if a majority or
                master weights show it.
        """
        self._compare(step)
        self._last_verified = step

    @torch.no_grad()
    def _compare(self, step: int) -> None:
        if not self._replica_sets:
            return
        device = self._world.device
        local = torch.zeros(len(self._replica_sets), 2, dtype=torch.int64, device=device)
        for index, replica_set in enumerate(self._replica_sets):
            if hashes := [hash_bits(replica.elements) for _, replica in self._replicas(replica_set)]:
                local[index] = hash_bits(torch.stack([value.to(device) for value in hashes]))
        rows = [torch.empty_like(local) for _ in range(self._world.topology.world_size)]
        dist.all_gather(rows, local)
        table = torch.stack(rows).tolist()  # [rank][replica set]
        differing = [
            replica_set
            for index, replica_set in enumerate(self._replica_sets)
            if any(
                table[rank][index] != table[group[0]][index] for group in self._groups[replica_set] for rank in group
            )
        ]
        if differing:
            raise self._mismatch_error(step, differing)

    def _replicas(self, replica_set: ReplicaSet) -> Iterator[tuple[str, _Replica]]:
        """Yield this rank's replicas by name, in the same order on all ranks of the set."""
        for name, parameter in sorted(self._local.get(replica_set, {}).items()):
            yield name, _Replica(parameter, *local_elements(parameter))

    # Which replica is wrong -------------------------------------------------------------------------------------------

    def _mismatch_error(self, step: int, differing: list[ReplicaSet]) -> ReplicasDifferError:
        """Find the weights and the ranks. Collective: all ranks must call it."""
        mismatches = self._find_mismatches(differing)
        wrong_ranks = [mismatch.minority_ranks() for mismatch in mismatches]
        tied = [index for index, ranks in enumerate(wrong_ranks[:MAX_REPORTED]) if not ranks]
        contradicted = self._contradicted_by_masters([mismatches[index] for index in tied])
        for index, ranks in zip(tied, contradicted, strict=True):
            wrong_ranks[index] = ranks
        hosts: list[str] = [""] * self._world.topology.world_size
        dist.all_gather_object(hosts, socket.gethostname())
        return ReplicasDifferError(
            describe_mismatches(mismatches, wrong_ranks, hosts, step=step, last_verified=self._last_verified)
        )

    def _find_mismatches(self, differing: list[ReplicaSet]) -> list[Mismatch]:
        """Find the weights whose replicas differ. Collective: all ranks must call it."""
        local = {
            replica_set: {name: _hash(replica.elements) for name, replica in self._replicas(replica_set)}
            for replica_set in differing
        }
        gathered: list[dict[ReplicaSet, dict[str, Hash]]] = [{}] * self._world.topology.world_size
        dist.all_gather_object(gathered, local)
        return [
            Mismatch(name, replica_set, hashes)
            for replica_set in differing
            for group in self._groups[replica_set]
            for name in gathered[group[0]][replica_set]
            if len(set((hashes := {rank: gathered[rank][replica_set][name] for rank in group}).values())) > 1
        ]

    def _contradicted_by_masters(self, mismatches: list[Mismatch]) -> list[set[int]]:
        """Find ranks whose replica differs from its fp32 master weights. Collective: all ranks must call it.

        Returns:
            A set per mismatch; empty if all or no replicas differ from the master weights, or there are none.
        """
        topology = self._world.topology
        local = [self._local_replica(mismatch) for mismatch in mismatches]
        fragments: list[list[_MasterFragment | None]] = [[]] * topology.world_size
        dist.all_gather_object(
            fragments, [None if replica is None else self._master_fragment(replica) for replica in local]
        )
        holders_of_masters = [topology.rank] if self._layout.is_replicated else topology.ranks_of(*GRADIENT_AXES)
        contradicted = [
            replica is not None
            and any(
                fragment.contradicts(replica)
                for holder in holders_of_masters
                if (fragment := fragments[holder][index]) is not None
            )
            for index, replica in enumerate(local)
        ]
        gathered: list[list[bool]] = [[]] * topology.world_size
        dist.all_gather_object(gathered, contradicted)
        ranks_by_mismatch = [
            {rank for rank in mismatch.hashes if gathered[rank][index]} for index, mismatch in enumerate(mismatches)
        ]
        return [
            set() if len(ranks) == len(mismatch.hashes) else ranks
            for ranks, mismatch in zip(ranks_by_mismatch, mismatches, strict=True)
        ]

    def _local_replica(self, mismatch: Mismatch) -> _Replica | None:
        """Find this rank's replica; None if it has none."""
        if self._world.topology.rank not in mismatch.hashes:
            return None
        return dict(self._replicas(mismatch.replica_set))[mismatch.name]

    def _master_fragment(self, replica: _Replica) -> _MasterFragment | None:
        """Hash this rank's master weights of a replica; None without any, and where the weight is its own master."""
        fragment = self._layout.fragment(replica.parameter) if replica.parameter.requires_grad else None
        if fragment is None or fragment.optimizer_tensor is replica.parameter:
            return None
        masters = self._layout.master_weights(fragment).to(replica.elements.dtype)
        return _MasterFragment(fragment.parameter_offset, fragment.length, _hash(masters))


def _hash(tensor: Tensor) -> Hash:
    low, high = hash_bits(tensor).tolist()
    return low, high
