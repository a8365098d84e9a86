"""The record of the part of a tensor that this rank holds, attached to the parameter, so no name is parsed again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.compat.deepspeed.flags import set_tensor_parallel
from trainer.topology import Axis

_ATTRIBUTE = "tessera_shard"

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class DimShard:
    """This rank's slice of one dimension, divided along one parallel axis.

    Along `dim` the tensor consists of the matrices whose sizes `packed` lists (one as a rule; three for a fused q|k|v).
    Each matrix is divided into `count` equal parts. This rank holds part `index` of each, one after the other.
    """

    dim: int
    index: int
    count: int
    packed: tuple[int, ...]
    axis: Axis = "tensor"
    start: int = 0
    """Offset of the packed matrices along `dim`, for a parameter that holds only some matrices of a fused weight."""

    @property
    def local_size(self) -> int:
        """Size of the dimension on this rank, padding included."""
        return sum(math.ceil(size / self.count) for size in self.packed)

    def covers(self, size: int) -> bool:
        """Whether the packed matrices make up the whole dimension, which has `size` elements."""
        return self.start == 0 and sum(self.packed) == size

    def ranges(self) -> Iterator[tuple[slice, slice]]:
        """Yield (range in the local shard, range in the full tensor) along `dim`, one pair a packed matrix.

        A range ends where its matrix ends in the full tensor: the elements after it in the local shard are padding.
        """
        local, full = 0, self.start
        for size in self.packed:
            length = math.ceil(size / self.count)
            first = min(self.index * length, size)
            last = min(first + length, size)
            yield slice(local, local + last - first), slice(full + first, full + last)
            local, full = local + length, full + size


@dataclass(frozen=True)
class Shard:
    """The part of a full tensor that this rank holds: the product of its slices.

    A tensor may be sliced along several dimensions, each by another axis: an expert's weight along dimension 0 by
    expert and along dimension 1 by tensor. Without slices the rank holds the full tensor.
    """

    name: str
    """The tensor's Hugging Face name."""

    full_shape: tuple[int, ...]
    slices: tuple[DimShard, ...] = ()
    """At most one for each dimension and for each axis."""

    owner: bool = True
    """Whether this rank counts the part in norms and saves it: true on exactly one of the tensor ranks that hold it.

    Says nothing about pipeline stages (`is_counted_elsewhere`) and data ranks (`TrainingState.owned_chunks`).
    """

    owner_only: bool = False
    """Whether only the owner stores the tensor; it is zero and frozen on the other ranks."""

    copies: int = 1
    """Number of neighboring tensor ranks whose gradients of this part must be summed; 1 if none.

    These ranks hold the same part and use it on sharded activations, so that each has a partial gradient. A full tensor
    can have copies, too: a single key/value head, a norm of each head. One that all ranks use on full activations has
    the value 1.
    """

    @classmethod
    def full(
        cls,
        name: str,
        shape: torch.Size | tuple[int, ...],
        *,
        owner: bool = True,
        owner_only: bool = False,
        copies: int = 1,
    ) -> Shard:
        """Return the record of a tensor that this rank holds in full."""
        return cls(name, tuple(shape), owner=owner, owner_only=owner_only, copies=copies)

    @property
    def is_full(self) -> bool:
        """Whether this rank holds the full tensor."""
        return all(part.count == 1 for part in self.slices) and self.covers_full_tensor

    @property
    def covers_full_tensor(self) -> bool:
        """Whether the shards of all ranks make up the full tensor, and not only some matrices of a fused one."""
        return all(part.covers(self.full_shape[part.dim]) for part in self.slices)

    def along(self, axis: Axis) -> DimShard | None:
        """Return the slice that the ranks of `axis` divide, if there is one."""
        return next((part for part in self.slices if part.axis == axis), None)

    def replica_count(self, tensor_ranks: int) -> int:
        """Return how many neighboring ranks of `tensor_ranks` hold the same part, full tensors included."""
        if self.owner_only:
            return 1
        part = self.along("tensor")
        is_replicated = part is None or (part.count == 1 and part.covers(self.full_shape[part.dim]))
        return tensor_ranks if is_replicated else self.copies

    def local_shape(self) -> tuple[int, ...]:
        """Return the shape of the part that this rank holds, padding included."""
        shape = list(self.full_shape)
        for part in self.slices:
            shape[part.dim] = part.local_size
        return tuple(shape)

    def blocks(self) -> Iterator[tuple[Slices, Slices]]:
        """Yield (index into the local shard, index into the full tensor) of each block that is dense in both.

        The blocks are the product of the slices' ranges. They leave out padding.
        """
        for ranges in itertools.product(*(part.ranges() for part in self.slices)):
            local = [slice(0, size) for size in self.full_shape]
            full = list(local)
            for part, (local_range, full_range) in zip(self.slices, ranges, strict=True):
                local[part.dim], full[part.dim] = local_range, full_range
            if all(block.start < block.stop for block in full):
                yield tuple(local), tuple(full)

    def overlaps(self, offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[Slices, Slices]]:
        """Yield the intersection of the shard with the chunk of the full tensor at `offsets`, of `sizes`.

        Yields:
            (index into the local shard, index into the chunk) of blocks of the same shape.
        """
        for local_index, full_index in self.blocks():
            local, chunk = [], []
            for local_range, full_range, offset, size in zip(local_index, full_index, offsets, sizes, strict=True):
                first, last = max(full_range.start, offset), min(full_range.stop, offset + size)
                shift = local_range.start - full_range.start
                local.append(slice(first + shift, last + shift))
                chunk.append(slice(first - offset, last - offset))
            if all(block.start < block.stop for block in chunk):
                yield tuple(local), tuple(chunk)

    def extract(self, full: Tensor) -> Tensor:
        """Copy this rank's part out of `full` (`full_shape`), as a tensor of `local_shape`; padding is zero."""
        if self.is_full:
            return full.clone()
        local = full.new_zeros(self.local_shape())
        for local_index, full_index in self.blocks():
            local[local_index].copy_(full[full_index])
        return local

    def insert(self, local: Tensor, full: Tensor) -> None:
        """Copy this rank's part, `local` (`local_shape`), into its position in `full` (`full_shape`)."""
        for local_index, full_index in self.blocks():
            full[full_index].copy_(local[local_index])


def set_shard(parameter: nn.Parameter, shard: Shard) -> None:
    """Attach the record to the parameter, and set DeepSpeed's flag for "this rank counts it in the gradient norm".

    Without the flag DeepSpeed counts a parameter on the first tensor rank only. That is right for full ones. It is also
    right for the second copy of a shard, which another rank has counted.
    """
    setattr(parameter, _ATTRIBUTE, shard)
    set_tensor_parallel(parameter, not shard.is_full and shard.owner)


def shard_of(parameter: Tensor) -> Shard | None:
    """Return the record of a parameter; None if no axis shards its model."""
    record: Any = getattr(parameter, _ATTRIBUTE, None)
    return record if isinstance(record, Shard) else None


def is_owned(parameter: Tensor) -> bool:
    """Return whether this rank counts the parameter in sums over the ranks of a model, such as the gradient norm."""
    shard = shard_of(parameter)
    return shard is None or shard.owner
