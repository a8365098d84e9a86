"""Which part of a weight this rank holds. The record lies on the parameter; nobody guesses it from a name again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_ATTRIBUTE = "tessera_shard"


@dataclass(frozen=True)
class Shard:
    """A box of a whole weight.

    The weight consists, along `dim`, of the matrices whose sizes `packed` lists (one, as a rule; three for a fused
    q|k|v). Each of them is cut into `of` equal parts, and this rank holds part `index` of each, one after the other.
    """

    name: str
    """The weight's Hugging Face name."""

    full_shape: tuple[int, ...]
    dim: int = 0
    index: int = 0
    of: int = 1
    packed: tuple[int, ...] = ()
    start: int = 0
    """Where the packed matrices begin along `dim`, for a parameter that holds only some of those that the weight
    consists of."""

    owner: bool = True
    """Whether this rank counts the part in norms and writes it: true on exactly one holder of each part."""

    owner_only: bool = False
    """Whether only the owner has the weight, and the other ranks have zeros in its place, which nothing trains."""

    copies: int = 1
    """How many neighbouring tensor ranks hold this very part and use it on sharded activations, so that the gradient of
    each is partial and has to be summed over them; 1 for a part that no other rank has, and for a weight that all ranks
    have and use on full activations. Also of a full weight: a single key/value head, a norm of each head."""

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
        packed = (shape[0],) if len(shape) else ()
        return cls(name, tuple(shape), packed=packed, owner=owner, owner_only=owner_only, copies=copies)

    @property
    def is_full(self) -> bool:
        return self.of == 1 and self.covers_full_tensor

    @property
    def covers_full_tensor(self) -> bool:
        """Whether it speaks of all matrices of the weight, not only of some in a fused one."""
        return self.start == 0 and sum(self.packed) == (self.full_shape or (0,))[self.dim]

    def replica_count(self, ranks: int) -> int:
        """How many neighbouring tensor ranks of `ranks` hold this very part, full weights included."""
        if self.owner_only:
            return 1
        return ranks if self.is_full else self.copies

    def local_shape(self) -> tuple[int, ...]:
        """Shape of what this rank holds, padding included."""
        shape = list(self.full_shape)
        if shape:
            shape[self.dim] = sum(math.ceil(size / self.of) for size in self.packed)
        return tuple(shape)

    def ranges(self) -> Iterator[tuple[slice, slice]]:
        """Pairs of (range in the part that this rank holds, range in the whole weight), along `dim`.

        Ranges end where the whole weight ends; what lies behind in this rank's part is padding.
        """
        here, there = 0, self.start
        for size in self.packed:
            length = math.ceil(size / self.of)
            first = min(self.index * length, size)
            last = min(first + length, size)
            yield slice(here, here + last - first), slice(there + first, there + last)
            here, there = here + length, there + size

    def extract(self, whole: Tensor) -> Tensor:
        """This rank's part of `whole`, as a tensor of its own; padding is zero."""
        if self.is_full:
            return whole.clone()
        local = whole.new_zeros(self.local_shape())
        for here, there in self.ranges():
            length = here.stop - here.start
            local.narrow(self.dim, here.start, length).copy_(whole.narrow(self.dim, there.start, length))
        return local

    def insert(self, local: Tensor, whole: Tensor) -> None:
        """Writes this rank's part into its place in `whole`."""
        if not self.full_shape:
            whole.copy_(local)
            return
        for here, there in self.ranges():
            length = here.stop - here.start
            whole.narrow(self.dim, there.start, length).copy_(local.narrow(self.dim, here.start, length))


def set_shard(parameter: nn.Parameter, shard: Shard) -> None:
    """Lays the record on the parameter, with DeepSpeed's flag beside it: "this rank counts it in the norm".

    Without the flag DeepSpeed counts a parameter on the first tensor rank only, which is right for whole ones, and
    leaves out a second copy of a part on the others.
    """
    setattr(parameter, _ATTRIBUTE, shard)
    parameter.tensor_model_parallel = not shard.is_full and shard.owner  # type: ignore[attr-defined]


def shard_of(parameter: Tensor) -> Shard | None:
    """The record on a parameter; None where no tensor parallelism is at work."""
    record: Any = getattr(parameter, _ATTRIBUTE, None)
    return record if isinstance(record, Shard) else None


def is_owned(parameter: Tensor) -> bool:
    """Whether this rank counts the parameter in sums over the tensor ranks, such as the gradient's norm."""
    shard = shard_of(parameter)
    return shard is None or shard.owner
