"""Join the shards of a model's ranks to full tensors, one tensor at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch.distributed as dist
from torch import Tensor

from trainer.distributed.collectives import Group, all_gather
from trainer.sharding.shard import Shard
from trainer.topology import Axis


class Joiner:
    """Joins the shards of the ranks along each axis. All ranks add the same parameters in the same order."""

    def __init__(self, group_of: Callable[[Axis], Group]) -> None:
        """Join the shards of the ranks in the group that `group_of` returns for an axis."""
        self._group_of = group_of
        self._partial: dict[str, tuple[Tensor, int]] = {}
        """Incomplete tensors: the tensor, and the number of its elements so far."""

    def add(self, name: str, local: Tensor, shard: Shard | None) -> Iterator[tuple[str, Tensor]]:
        """Yield the full tensor. Collective: all ranks of the groups that slice the parameter must call it.

        A full tensor whose shards are several parameters is yielded with the last of them.

        Args:
            name: of the parameter, for one without a record.
            local: (the shard's `local_shape`).
            shard: the parameter's record.

        Yields:
            (Hugging Face name, tensor of the shard's `full_shape`).
        """
        if shard is None or shard.is_full:
            yield (name if shard is None else shard.name), local
            return
        full, numel = self._partial.pop(shard.name, (local.new_empty(shard.full_shape), 0))
        for gathered, tensor in self._gather(local, shard):
            gathered.insert(tensor, full)
        sizes = list(shard.full_shape)
        for part in shard.slices:
            sizes[part.dim] = sum(part.packed)
        numel += math.prod(sizes)
        if numel == full.numel():
            yield shard.name, full
        else:
            self._partial[shard.name] = full, numel

    def _gather(self, local: Tensor, shard: Shard) -> Iterator[tuple[Shard, Tensor]]:
        """Yield each rank's shard once. Collective: all ranks of the groups that slice the shard must call it."""
        tensors, indices = local.unsqueeze(0), []
        for part in shard.slices:
            group = self._group_of(part.axis)
            ranks = dist.get_world_size(group)
            tensors = all_gather(tensors, 0, group)
            # Neighboring ranks may hold copies of the same part, so several ranks may have the same index.
            indices.append([rank * part.count // ranks for rank in range(ranks)])
        # Each gathering makes the rank of its axis the slowest index of dimension 0: the last axis is the outermost.
        for combination, tensor in zip(itertools.product(*reversed(indices)), tensors, strict=True):
            slices = zip(shard.slices, reversed(combination), strict=True)
            yield replace(shard, slices=tuple(replace(part, index=index) for part, index in slices)), tensor
