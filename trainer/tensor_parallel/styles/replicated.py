"""Styles of parameters that every rank holds in full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from trainer.sharding.shard import Shard
from trainer.tensor_parallel.styles.base import FullStyle, ParameterTarget


@dataclass(frozen=True)
class _Reasoned(FullStyle):
    """A replicated parameter, with the reason."""

    reason: str = ""

    @classmethod
    def parse(cls, argument: str) -> Self:
        """Read a reason."""
        return cls(argument)

    @property
    def argument(self) -> str:
        """See `Style.argument`."""
        return self.reason


@dataclass(frozen=True)
class Replicated(_Reasoned):
    """Full, used on full activations: `replicate[:reason]`."""

    name: ClassVar[str] = "replicate"


@dataclass(frozen=True)
class ReplicatedSumGradient(_Reasoned):
    """Full, used on sharded activations, its gradient summed over ranks: `replicated_with_grad_allreduce[:reason]`."""

    name: ClassVar[str] = "replicated_with_grad_allreduce"
    allows_sharded_sequence: ClassVar[bool] = True

    def shards(self, target: ParameterTarget, rank: int, ranks: int) -> tuple[Shard, ...]:
        """See `ParameterStyle.shards`."""
        return (Shard.full(target.name, target.shape, owner=rank == 0, copies=ranks),)


@dataclass(frozen=True)
class FirstRankOnly(FullStyle):
    """Full on the first rank and zero on the others, as a bias inside a sum over ranks: `first_rank`."""

    name: ClassVar[str] = "first_rank"

    def shards(self, target: ParameterTarget, rank: int, ranks: int) -> tuple[Shard, ...]:
        """See `ParameterStyle.shards`."""
        return (Shard.full(target.name, target.shape, owner=rank == 0, owner_only=True),)
