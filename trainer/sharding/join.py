"""Puts cut weights together again, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from trainer.distributed.collectives import Group, all_gather
from trainer.sharding.shard import Shard


class Joiner:
    """Joins the parts of a tensor group's ranks. All its ranks add the same parameters in the same order."""

    def __init__(self, group: Group, ranks: int) -> None:
        self._group, self._ranks = group, ranks
        self._partial: dict[str, tuple[Tensor, int]] = {}
        """Weights of which some pieces are there: the tensor, and how far it is filled."""

    def add(self, name: str, part: Tensor, shard: Shard | None) -> Iterator[tuple[str, Tensor]]:
        """Gives (Hugging Face name, whole weight), once its last piece is there."""
        if shard is None or shard.is_full:
            yield (name if shard is None else shard.name), part
            return
        whole, filled = self._partial.pop(shard.name, (part.new_empty(shard.full_shape), 0))
        for rank, held in enumerate(all_gather(part.unsqueeze(0), 0, self._group)):
            replace(shard, index=rank * shard.of // self._ranks).insert(held, whole)
        filled += sum(shard.packed)
        if filled == shard.full_shape[shard.dim]:
            yield shard.name, whole
        else:
            self._partial[shard.name] = whole, filled
