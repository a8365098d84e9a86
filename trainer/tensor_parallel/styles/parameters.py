"""Styles of bare parameters, and of modules that compute with their own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import nn

from trainer.tensor_parallel.styles.base import ModuleStyle, Shape, ShardedStyle
from trainer.tensor_parallel.units import parse_integer


@dataclass(frozen=True)
class ShardedParameter(ShardedStyle):
    """A bare parameter sharded along a dimension: `cut:dimension[:how many, or their parts]`."""

    name: ClassVar[str] = "cut"
    allows_sharded_sequence: ClassVar[bool] = True

    dim: int = 0

    @classmethod
    def parse(cls, argument: str) -> Self:
        """Read a dimension, and what `ShardedStyle.parse` reads."""
        dim, _, rest = argument.partition(":")
        return replace(super().parse(rest), dim=parse_integer(dim))

    @property
    def argument(self) -> str:
        """See `Style.argument`."""
        rest = super().argument
        return f"{self.dim}:{rest}" if rest else str(self.dim)

    def shard_dim(self, module: nn.Module, shape: Shape) -> int | None:
        """See `ShardedStyle.shard_dim`."""
        return self.dim


@dataclass(frozen=True)
class LocalParameters(ModuleStyle):
    """The module computes with its own sharded parameters, unchanged: `local_params`."""

    name: ClassVar[str] = "local_params"
    allows_sharded_sequence: ClassVar[bool] = True
