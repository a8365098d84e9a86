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

from trainer.distributed import World
from trainer.engine.holding import Holding
from trainer.engine.tensor_hash import hash_bits
from trainer.errors import ReplicasDifferError
from trainer.pipeline import local_parameters
from trainer.topology import Topology

log = logging.getLogger(__name__)

_EXAMINED = 8
"""Of the weights that differ, so many are compared with their master weights and named."""

Hash = tuple[int, int]


class Holders(NamedTuple):
    """Along which axes other ranks hold the same as this one. Sorts."""

    stages: tuple[int, ...]
    """Ranks of the pipeline; none where the rank's own alone holds it."""

    tensor: int
    """Neighbouring tensor ranks."""

    data: bool
    """Whether all data ranks do."""

    def ranks(self, own: Topology) -> tuple[int, ...]:
        """The ranks that hold what `own` does, in ascending order; none if `own` does not hold it either."""
        if self.stages and own.stage not in self.stages:
            return ()
        first = own.tensor_rank - own.tensor_rank % self.tensor
        return tuple(
            (stage * own.data + data_rank) * own.tensor + tensor_rank
            for stage in self.stages or (own.stage,)
            for data_rank in (range(own.data) if self.data else (own.data_rank,))
            for tensor_rank in range(first, first + self.tensor)
        )


@dataclass(frozen=True)
class _Copy:
    """What this rank holds of a weight that others hold, too."""

    parameter: nn.Parameter
    bits: Tensor
    """Its elements, flattened."""

    first: int
    """Where they begin in the parameter, flattened; 0 but under ZeRO 3."""


class _Difference(NamedTuple):
    """A weight whose copies differ."""

    name: str
    holders: Holders
    hashes: dict[int, Hash]
    """By rank."""


class _Fragment(NamedTuple):
    """A stretch of a weight, flattened, of which a rank has the fp32 master weights."""

    first: int
    length: int
    hash: Hash
    """Of the master weights, cast to the weight's type."""


class Replicas:
    """Compares the copies of all weights, by hash.

    In a step that verifies, after the update; and where updates write weights from master weights, also before it: they
    overwrite a copy that has become wrong, after it has spoilt the gradient.
    """

    def __init__(
        self, models: Sequence[nn.Module], stages: Mapping[str, tuple[int, ...]], holding: Holding, world: World
    ) -> None:
        """To be called on all ranks.

        Args:
            models: of this rank's stages. stages: ranks of the pipeline that hold each weight; empty without one.
            holding: the optimizer's.
        """
        self._holding, self._world = holding, world
        self._verified: int | None = None
        self._own: dict[Holders, dict[str, nn.Parameter]] = defaultdict(dict)
        for name, parameter, holders in _held(models, stages, world.topology):
            if len(holders.ranks(world.topology)) > 1:
                self._own[holders][name] = parameter
        everywhere: list[list[Holders]] = [[]] * world.topology.world
        dist.all_gather_object(everywhere, sorted(self._own))
        self._sets = sorted({Holders(*holders) for sets in everywhere for holders in sets})
        """What some ranks hold together with others, in the same order on all ranks."""

        topologies = [replace(world.topology, rank=rank) for rank in range(world.topology.world)]
        self._groups = {
            holders: sorted({ranks for topology in topologies if (ranks := holders.ranks(topology))})
            for holders in self._sets
        }
        if not self._sets:
            log.warning("training.verify_every_steps: no weight is held by several ranks, nothing is compared")

    def verify_before_update(self, step: int) -> None:
        """As `verify`, between the backward pass and the update; does nothing where no update would hide anything."""
        if self._holding.has_master_weights:
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
        if not self._sets:
            return
        device = self._world.device
        own = torch.zeros(len(self._sets), 2, dtype=torch.int64, device=device)
        for number, holders in enumerate(self._sets):
            if hashes := [hash_bits(copy.bits) for _, copy in self._copies(holders)]:
                own[number] = hash_bits(torch.stack([each.to(device) for each in hashes]))
        rows = [torch.empty_like(own) for _ in range(self._world.topology.world)]
        dist.all_gather(rows, own)
        table = torch.stack(rows).tolist()
        differing = [
            holders
            for number, holders in enumerate(self._sets)
            if any(table[rank][number] != table[group[0]][number] for group in self._groups[holders] for rank in group)
        ]
        if differing:
            raise self._error(step, differing)

    def _copies(self, holders: Holders) -> Iterator[tuple[str, _Copy]]:
        for name, parameter in sorted(self._own.get(holders, {}).items()):
            if not hasattr(parameter, "ds_tensor"):
                yield name, _Copy(parameter, parameter.detach().reshape(-1), 0)
                continue
            part = parameter.ds_tensor.detach().reshape(-1)
            first = dist.get_rank(parameter.ds_process_group) * part.numel()  # type: ignore[attr-defined]
            count = max(0, min(part.numel(), int(parameter.ds_numel) - first))  # type: ignore[attr-defined]
            yield name, _Copy(parameter, part[:count], first)

    # Which copy is wrong ---------------------------------------------------------------------------------------------

    def _error(self, step: int, differing: list[Holders]) -> ReplicasDifferError:
        """On all ranks: finds the weights and the ranks."""
        differences = self._differences(differing)
        wrong = [_outvoted(each) for each in differences]
        tied = [number for number, ranks in enumerate(wrong[:_EXAMINED]) if not ranks]
        for number, ranks in zip(tied, self._unlike_masters([differences[n] for n in tied]), strict=True):
            wrong[number] = ranks
        hosts: list[str] = [""] * self._world.topology.world
        dist.all_gather_object(hosts, socket.gethostname())
        return ReplicasDifferError(_message(step, self._verified, differences, wrong, hosts))

    def _differences(self, differing: list[Holders]) -> list[_Difference]:
        own = {holders: {name: _hash(copy.bits) for name, copy in self._copies(holders)} for holders in differing}
        everywhere: list[dict[Holders, dict[str, Hash]]] = [{}] * self._world.topology.world
        dist.all_gather_object(everywhere, own)
        return [
            _Difference(name, holders, hashes)
            for holders in differing
            for group in self._groups[holders]
            for name in everywhere[group[0]][holders]
            if len(set((hashes := {rank: everywhere[rank][holders][name] for rank in group}).values())) > 1
        ]

    def _unlike_masters(self, differences: list[_Difference]) -> list[set[int]]:
        """For each weight: the ranks whose copy is not what their fp32 master weights give; none if all or no copies
        are, or there are no master weights besides."""
        rank, topology = self._world.topology.rank, self._world.topology
        own = [self._copy(each) for each in differences]
        fragments: list[list[_Fragment | None]] = [[]] * topology.world
        dist.all_gather_object(fragments, [None if copy is None else self._fragment(copy) for copy in own])
        masters = [rank] if self._holding.is_replicated else topology.group("data")
        unlike = [
            copy is not None and any(_is_unlike(copy, fragments[master][number]) for master in masters)
            for number, copy in enumerate(own)
        ]
        everywhere: list[list[bool]] = [[]] * topology.world
        dist.all_gather_object(everywhere, unlike)
        named = [{rank for rank in each.hashes if everywhere[rank][number]} for number, each in enumerate(differences)]
        return [
            set() if len(ranks) == len(each.hashes) else ranks for ranks, each in zip(named, differences, strict=True)
        ]

    def _copy(self, difference: _Difference) -> _Copy | None:
        """This rank's; None if it is not one of the holders."""
        if self._world.topology.rank not in difference.hashes:
            return None
        return dict(self._copies(difference.holders))[difference.name]

    def _fragment(self, copy: _Copy) -> _Fragment | None:
        """What this rank has of the master weights; None without any, and where the weight is its own master."""
        held = self._holding.held(copy.parameter) if copy.parameter.requires_grad else None
        if held is None or held.stepped is copy.parameter:
            return None
        return _Fragment(held.first, held.length, _hash(self._holding.weights(held).to(copy.bits.dtype)))


def _held(
    models: Sequence[nn.Module], stages: Mapping[str, tuple[int, ...]], topology: Topology
) -> Iterator[tuple[str, nn.Parameter, Holders]]:
    """Every parameter of this rank with a name that all its holders have for it."""
    for name, pieces in local_parameters(models).items():
        sharing = stages.get(name, ())
        for number, (parameter, shard) in enumerate(pieces):
            if shard is not None and shard.lone and not shard.owner:
                continue
            tensor = 1 if shard is None else shard.holders(topology.tensor)
            holders = Holders(sharing if len(sharing) > 1 else (), tensor, data=not hasattr(parameter, "ds_tensor"))
            yield f"{name} (part {number})" if number else name, parameter, holders


def _hash(tensor: Tensor) -> Hash:
    first, second = hash_bits(tensor).tolist()
    return first, second


def _outvoted(difference: _Difference) -> set[int]:
    """The ranks whose copy is another than that of more than half of the holders."""
    value, count = Counter(difference.hashes.values()).most_common(1)[0]
    if 2 * count <= len(difference.hashes):
        return set()
    return {rank for rank, own in difference.hashes.items() if own != value}


def _is_unlike(copy: _Copy, fragment: _Fragment | None) -> bool:
    """Whether a copy has other bits than the master weights give, in so far as these are in it."""
    if fragment is None:
        return False
    first = fragment.first - copy.first
    if first < 0 or first + fragment.length > copy.bits.numel():  # a part that another data rank holds, under ZeRO 3
        return False
    return _hash(copy.bits[first : first + fragment.length]) != fragment.hash


def _message(
    step: int, verified: int | None, differences: list[_Difference], wrong: list[set[int]], hosts: Sequence[str]
) -> str:
    lines: dict[str, list[str]] = defaultdict(list)
    for each, ranks in zip(differences[:_EXAMINED], wrong, strict=False):
        holders = sorted(each.hashes)
        if ranks:
            line = f"{_ranks(sorted(ranks), hosts)} of {_ranks(holders, hosts)} wrong"
        else:
            line = f"{_ranks(holders, hosts)} not the same, and neither a majority nor master weights tell who is wrong"
        lines[line].append(each.name)
    described = "; ".join(f"{', '.join(names)}: {line}" for line, names in lines.items())
    more = f"; and {len(differences) - _EXAMINED} more weights" if len(differences) > _EXAMINED else ""
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
        f"rank{'s' * (len(own) > 1)} {', '.join(map(str, own))} on {host}" for host, own in by_host.items()
    )
