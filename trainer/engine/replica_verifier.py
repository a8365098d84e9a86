"""Whether ranks that hold the same weight hold the same bits (`training.verify_every_steps`).

Which ranks these are, the shard record says for the tensor axis, the division into stages for the pipeline axis, and
the optimizer for the data axis: under ZeRO 0 to 2 all data ranks hold every weight, under ZeRO 3 none does. Buffers are
not compared: a model may compute them from each rank's own samples.
"""

from __future__ import annotations

import logging
import socket
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.compat.deepspeed.optimizer_layouts import OptimizerLayout
from trainer.distributed import World
from trainer.engine.tensor_hash import hash_bits
from trainer.errors import ReplicasDifferError
from trainer.pipeline import local_parameters
from trainer.topology import Topology

log = logging.getLogger(__name__)

_MAX_REPORTED = 8
"""Of the weights that differ, so many are compared with their master weights and named."""

Hash = tuple[int, int]


class ReplicaSet(NamedTuple):
    """Along which axes other ranks hold the same as this one. Sorts."""

    stages: tuple[int, ...]
    """Ranks of the pipeline; none where the rank's own alone holds it."""

    tensor: int
    """Neighbouring tensor ranks."""

    data: bool
    """Whether all data ranks do."""

    def ranks(self, topology: Topology) -> tuple[int, ...]:
        """The ranks that hold what `topology` does, in ascending order; none if `topology` does not hold it either."""
        if self.stages and topology.stage not in self.stages:
            return ()
        first = topology.tensor_rank - topology.tensor_rank % self.tensor
        return tuple(
            (stage * topology.data + data_rank) * topology.tensor + tensor_rank
            for stage in self.stages or (topology.stage,)
            for data_rank in (range(topology.data) if self.data else (topology.data_rank,))
            for tensor_rank in range(first, first + self.tensor)
        )


@dataclass(frozen=True)
class _Replica:
    """What this rank holds of a weight that others hold, too."""

    parameter: nn.Parameter
    elements: Tensor
    """Its elements, flattened."""

    parameter_offset: int
    """Where they begin in the parameter, flattened; 0 but under ZeRO 3."""


class _Mismatch(NamedTuple):
    """A weight whose copies differ."""

    name: str
    replica_set: ReplicaSet
    hashes: dict[int, Hash]
    """By rank."""


class _MasterFragment(NamedTuple):
    """A stretch of a weight, flattened, of which a rank has the fp32 master weights."""

    parameter_offset: int
    length: int
    hash: Hash
    """Of the master weights, cast to the weight's type."""


class ReplicaVerifier:
    """Compares the copies of all weights, by hash.

    In a step that verifies, after the update; and where updates write weights from master weights, also before it: they
    overwrite a copy that has become wrong, after it has spoilt the gradient.
    """

    def __init__(
        self, models: Sequence[nn.Module], stages: Mapping[str, tuple[int, ...]], layout: OptimizerLayout, world: World
    ) -> None:
        """To be called on all ranks.

        Args:
            models: of this rank's stages. stages: ranks of the pipeline that hold each weight; empty without one.
            layout: the optimizer's.
        """
        self._layout, self._world = layout, world
        self._verified: int | None = None
        self._local: dict[ReplicaSet, dict[str, nn.Parameter]] = defaultdict(dict)
        for name, parameter, replica_set in _replica_sets_of(models, stages, world.topology):
            if len(replica_set.ranks(world.topology)) > 1:
                self._local[replica_set][name] = parameter
        gathered: list[list[ReplicaSet]] = [[]] * world.topology.world_size
        dist.all_gather_object(gathered, sorted(self._local))
        self._replica_sets = sorted({ReplicaSet(*replica_set) for sets in gathered for replica_set in sets})
        """What some ranks hold together with others, in the same order on all ranks."""

        topologies = [replace(world.topology, rank=rank) for rank in range(world.topology.world_size)]
        self._groups = {
            replica_set: sorted({ranks for topology in topologies if (ranks := replica_set.ranks(topology))})
            for replica_set in self._replica_sets
        }
        if not self._replica_sets:
            log.warning("training.verify_every_steps: no weight is held by several ranks, nothing is compared")

    def verify_before_update(self, step: int) -> None:
        """As `verify`, between the backward pass and the update; does nothing where no update would hide anything."""
        if self._layout.has_master_weights:
            self._compare(step)

    def verify(self, step: int) -> None:
        """Compare all copies, after an optimizer step; all ranks must call it.

        One all-gather of 16 bytes for each set of weights that have the same holders: at most a few.

        Raises:
            ReplicasDifferError: on all ranks alike, naming the ranks whose copies are wrong, as far as that can be
                told.
        """
        self._compare(step)
        self._verified = step

    @torch.no_grad()
    def _compare(self, step: int) -> None:
        if not self._replica_sets:
            return
        device = self._world.device
        local = torch.zeros(len(self._replica_sets), 2, dtype=torch.int64, device=device)
        for number, replica_set in enumerate(self._replica_sets):
            if hashes := [hash_bits(replica.elements) for _, replica in self._local_replicas(replica_set)]:
                local[number] = hash_bits(torch.stack([each.to(device) for each in hashes]))
        rows = [torch.empty_like(local) for _ in range(self._world.topology.world_size)]
        dist.all_gather(rows, local)
        table = torch.stack(rows).tolist()
        differing = [
            replica_set
            for number, replica_set in enumerate(self._replica_sets)
            if any(
                table[rank][number] != table[group[0]][number] for group in self._groups[replica_set] for rank in group
            )
        ]
        if differing:
            raise self._mismatch_error(step, differing)

    def _local_replicas(self, replica_set: ReplicaSet) -> Iterator[tuple[str, _Replica]]:
        for name, parameter in sorted(self._local.get(replica_set, {}).items()):
            if not hasattr(parameter, "ds_tensor"):
                yield name, _Replica(parameter, parameter.detach().reshape(-1), 0)
                continue
            part = parameter.ds_tensor.detach().reshape(-1)
            parameter_offset = dist.get_rank(parameter.ds_process_group) * part.numel()  # type: ignore[attr-defined]
            count = max(0, min(part.numel(), int(parameter.ds_numel) - parameter_offset))  # type: ignore[attr-defined]
            yield name, _Replica(parameter, part[:count], parameter_offset)

    # Which copy is wrong ---------------------------------------------------------------------------------------------

    def _mismatch_error(self, step: int, differing: list[ReplicaSet]) -> ReplicasDifferError:
        """On all ranks: finds the weights and the ranks."""
        mismatches = self._find_mismatches(differing)
        wrong = [_minority_ranks(each) for each in mismatches]
        tied = [number for number, ranks in enumerate(wrong[:_MAX_REPORTED]) if not ranks]
        for number, ranks in zip(tied, self._ranks_unlike_masters([mismatches[n] for n in tied]), strict=True):
            wrong[number] = ranks
        hosts: list[str] = [""] * self._world.topology.world_size
        dist.all_gather_object(hosts, socket.gethostname())
        return ReplicasDifferError(_message(step, self._verified, mismatches, wrong, hosts))

    def _find_mismatches(self, differing: list[ReplicaSet]) -> list[_Mismatch]:
        local = {
            replica_set: {name: _hash(replica.elements) for name, replica in self._local_replicas(replica_set)}
            for replica_set in differing
        }
        gathered: list[dict[ReplicaSet, dict[str, Hash]]] = [{}] * self._world.topology.world_size
        dist.all_gather_object(gathered, local)
        return [
            _Mismatch(name, replica_set, hashes)
            for replica_set in differing
            for group in self._groups[replica_set]
            for name in gathered[group[0]][replica_set]
            if len(set((hashes := {rank: gathered[rank][replica_set][name] for rank in group}).values())) > 1
        ]

    def _ranks_unlike_masters(self, mismatches: list[_Mismatch]) -> list[set[int]]:
        """For each weight: the ranks whose copy is not what their fp32 master weights give; none if all or no copies
        are, or there are no master weights besides."""
        rank, topology = self._world.topology.rank, self._world.topology
        local = [self._local_replica(each) for each in mismatches]
        fragments: list[list[_MasterFragment | None]] = [[]] * topology.world_size
        dist.all_gather_object(
            fragments, [None if replica is None else self._master_fragment(replica) for replica in local]
        )
        masters = [rank] if self._layout.is_replicated else topology.group("data")
        unlike = [
            replica is not None and any(_differs_from_master(replica, fragments[master][number]) for master in masters)
            for number, replica in enumerate(local)
        ]
        gathered: list[list[bool]] = [[]] * topology.world_size
        dist.all_gather_object(gathered, unlike)
        named = [{rank for rank in each.hashes if gathered[rank][number]} for number, each in enumerate(mismatches)]
        return [
            set() if len(ranks) == len(each.hashes) else ranks for ranks, each in zip(named, mismatches, strict=True)
        ]

    def _local_replica(self, mismatch: _Mismatch) -> _Replica | None:
        """This rank's; None if it is not one of the holders."""
        if self._world.topology.rank not in mismatch.hashes:
            return None
        return dict(self._local_replicas(mismatch.replica_set))[mismatch.name]

    def _master_fragment(self, replica: _Replica) -> _MasterFragment | None:
        """What this rank has of the master weights; None without any, and where the weight is its own master."""
        fragment = self._layout.fragment(replica.parameter) if replica.parameter.requires_grad else None
        if fragment is None or fragment.optimizer_tensor is replica.parameter:
            return None
        return _MasterFragment(
            fragment.parameter_offset,
            fragment.length,
            _hash(self._layout.master_weights(fragment).to(replica.elements.dtype)),
        )


def _replica_sets_of(
    models: Sequence[nn.Module], stages: Mapping[str, tuple[int, ...]], topology: Topology
) -> Iterator[tuple[str, nn.Parameter, ReplicaSet]]:
    """Every parameter of this rank with a name that all its holders have for it."""
    for name, pieces in local_parameters(models).items():
        sharing = stages.get(name, ())
        for number, (parameter, shard) in enumerate(pieces):
            if shard is not None and shard.owner_only and not shard.owner:
                continue
            tensor = 1 if shard is None else shard.replica_count(topology.tensor)
            replica_set = ReplicaSet(
                sharing if len(sharing) > 1 else (), tensor, data=not hasattr(parameter, "ds_tensor")
            )
            yield f"{name} (part {number})" if number else name, parameter, replica_set


def _hash(tensor: Tensor) -> Hash:
    low, high = hash_bits(tensor).tolist()
    return low, high


def _minority_ranks(mismatch: _Mismatch) -> set[int]:
    """The ranks whose copy is another than that of more than half of the holders."""
    value, count = Counter(mismatch.hashes.values()).most_common(1)[0]
    if 2 * count <= len(mismatch.hashes):
        return set()
    return {rank for rank, local in mismatch.hashes.items() if local != value}


def _differs_from_master(replica: _Replica, master_fragment: _MasterFragment | None) -> bool:
    """Whether a copy has other bits than the master weights give, in so far as these are in it."""
    if master_fragment is None:
        return False
    parameter_offset = master_fragment.parameter_offset - replica.parameter_offset
    if (
        parameter_offset < 0 or parameter_offset + master_fragment.length > replica.elements.numel()
    ):  # a part that another data rank holds, under ZeRO 3
        return False
    return _hash(replica.elements[parameter_offset : parameter_offset + master_fragment.length]) != master_fragment.hash


def _message(
    step: int, verified: int | None, mismatches: list[_Mismatch], wrong: list[set[int]], hosts: Sequence[str]
) -> str:
    lines: dict[str, list[str]] = defaultdict(list)
    for each, ranks in zip(mismatches[:_MAX_REPORTED], wrong, strict=False):
        holders = sorted(each.hashes)
        if ranks:
            line = f"{_ranks(sorted(ranks), hosts)} of {_ranks(holders, hosts)} wrong"
        else:
            line = f"{_ranks(holders, hosts)} not the same, and neither a majority nor master weights tell who is wrong"
        lines[line].append(each.name)
    described = "; ".join(f"{', '.join(names)}: {line}" for line, names in lines.items())
    more = f"; and {len(mismatches) - _MAX_REPORTED} more weights" if len(mismatches) > _MAX_REPORTED else ""
    since = "no earlier step was compared" if verified is None else f"equal after step {verified}"
    until = "" if verified is None else f" of step {verified} or before"
    return (
        f"step {step}: copies of weights differ ({since}). {described}{more}. Suspect the memory or the device of the "
        f"rank; resume from a checkpoint{until} (--resume DIR)"
    )


def _ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    by_host: dict[str, list[int]] = defaultdict(list)
    for rank in ranks:
        by_host[hosts[rank]].append(rank)
    return " and ".join(
        f"rank{'s' * (len(local) > 1)} {', '.join(map(str, local))} on {host}" for host, local in by_host.items()
    )
