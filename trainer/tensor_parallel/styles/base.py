"""The base classes of styles, and the registry by the name that plans use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, Self

from torch import nn
from transformers.pytorch_utils import Conv1D

from trainer.sharding.shard import DimShard, Shard
from trainer.tensor_parallel.region import Region
from trainer.tensor_parallel.units import (
    ALL,
    Part,
    ResolvedPart,
    Scope,
    check_expression,
    equal_parts,
    listed_parts,
    repeated_parts,
    split_unit,
)

Shape = tuple[int, ...]

STYLES: dict[str, type[Style]] = {}
"""Every style by its name in a plan."""


@dataclass(frozen=True)
class ModuleTarget:
    """A module that the plan changes."""

    name: str
    module: nn.Module
    parent: nn.Module
    styles: tuple[Style, ...]


@dataclass(frozen=True)
class ParameterTarget:
    """A parameter or buffer that the plan assigns to ranks."""

    name: str
    shape: Shape
    module: nn.Module
    """The module that has it."""

    scope: Scope


@dataclass(frozen=True)
class Style:
    """A style of a plan entry. The first line of a style's docstring is its documentation: meaning, usage.

    In a user's plan a style is its `name`, with its argument, if any, after a colon: `colwise:head_dim`.
    """

    name: ClassVar[str]
    starts_region: ClassVar[bool] = False
    """Whether a tensor-parallel region begins with it."""

    allows_sharded_sequence: ClassVar[bool] = False
    """Whether a module enters the region once with its input and leaves it once with its output, so that a sharded
    sequence can be gathered and scattered there. Modules with other styles get and return the full sequence, which
    costs twice the traffic."""

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            if STYLES.get(cls.name, cls).__qualname__ != cls.__qualname__:
                raise TypeError(f"two styles are called '{cls.name}'")
            STYLES[cls.name] = cls

    @classmethod
    def parse(cls, argument: str) -> Self:
        """Read the text after the colon.

        Raises:
            ValueError: if the style takes no such argument.
        """
        if argument:
            raise ValueError(f"'{cls.name}' takes no argument")
        return cls()

    @classmethod
    def documentation(cls) -> tuple[str, str]:
        """Return (how a plan writes the style, what it means), from the first line of the docstring."""
        meaning, _, usage = (cls.__doc__ or "").partition("\n")[0].rpartition(": ")
        return usage.removesuffix(".").strip("`"), meaning

    @property
    def argument(self) -> str:
        """The text after the colon, as `parse` reads it."""
        return ""

    def __str__(self) -> str:
        return f"{self.name}:{self.argument}" if self.argument else self.name

    def parameter_style(self) -> ParameterStyle | None:
        """Return the style of the module's parameters; None if this style does not apply to them."""
        return None

    def install(self, region: Region, target: ModuleTarget) -> None:
        """Change the module, whose parameters are sharded already."""


@dataclass(frozen=True)
class ModuleStyle(Style):
    """A style that changes a module, but not its parameters."""


@dataclass(frozen=True)
class ParameterStyle(Style):
    """A style that assigns a parameter to ranks; on a module, all parameters of the module."""

    def parameter_style(self) -> ParameterStyle | None:
        """See `Style.parameter_style`."""
        return self

    def shards(self, target: ParameterTarget, rank: int, ranks: int) -> tuple[Shard, ...]:
        """Return this rank's shards of the parameter; several if ranks share a part of a fused weight.

        Raises:
            Refused: if the parameter cannot be divided so.
        """
        return (Shard.full(target.name, target.shape, owner=rank == 0),)


@dataclass(frozen=True)
class ShardedStyle(ParameterStyle, ABC):
    """A style that shards a parameter along one dimension, in whole units of the matrices it consists of.

    The matrices are `count` equal ones, or ones of the size `each`, or those of `parts`. Sizes are expressions.
    """

    count: int | None = None
    """Number of equal matrices; None for the style's own number."""

    unit: str = ""
    """Size of the unit that stays on one rank; empty for 1."""

    each: str = ""
    parts: tuple[Part, ...] = ()

    default_count: ClassVar[int] = 1
    shares_units: ClassVar[bool] = False
    """Whether several ranks hold the same unit where there are fewer units than ranks."""

    def __post_init__(self) -> None:
        if bool(self.count or self.unit) + bool(self.each) + bool(self.parts) > 1:
            raise ValueError(f"{type(self).__name__} takes a count and a unit, or the size of each matrix, or parts")
        if self.count is not None and self.count < 1:
            raise ValueError(f"{type(self).__name__} takes a count of at least 1 (got {self.count})")
        for text in filter(None, (self.unit, self.each)):
            check_expression(text)

    @classmethod
    def parse(cls, argument: str) -> Self:
        """Read `count[/unit]`, `each size`, or `[~]size[/unit],...`; `~` lets ranks share the units of a part."""
        if not argument:
            return cls()
        count, unit = split_unit(argument)
        if count.isdigit() and "," not in argument:
            return cls(count=int(count), unit=unit)
        if argument.startswith("each "):
            return cls(each=argument.removeprefix("each "))
        if "," not in argument and count == ALL and not cls.shares_units:
            return cls(count=1, unit=unit)
        return cls(parts=tuple(Part.parse(item) for item in argument.split(",")))

    @property
    def argument(self) -> str:
        """See `Style.argument`."""
        if self.parts:
            return ",".join(str(part) for part in self.parts)
        if self.each:
            return f"each {self.each}"
        if not self.unit:
            return "" if self._count == self.default_count else str(self._count)
        return f"{ALL if self._count == 1 else self._count}/{self.unit}"

    @property
    def _count(self) -> int:
        return self.default_count if self.count is None else self.count

    @abstractmethod
    def shard_dim(self, module: nn.Module, shape: Shape) -> int | None:
        """Return the dimension that is sharded; None if the parameter stays full."""

    def shards(self, target: ParameterTarget, rank: int, ranks: int) -> tuple[Shard, ...]:
        """See `ParameterStyle.shards`."""
        dim = self.shard_dim(target.module, target.shape)
        if dim is None:
            return super().shards(target, rank, ranks)
        return tuple(self._grouped(target, dim, rank, ranks))

    def _resolve(self, length: int, scope: Scope) -> tuple[ResolvedPart, ...]:
        """Evaluate the matrices that a dimension of `length` elements consists of."""
        if self.parts:
            return listed_parts(length, self.parts, scope)
        if self.each:
            return repeated_parts(length, scope.number(self.each), self.each)
        if self._count == 1 and self.unit:
            return listed_parts(length, (Part(unit=self.unit, shared=self.shares_units),), scope)
        return equal_parts(length, self._count, scope.number(self.unit) if self.unit else 1)

    def _grouped(self, target: ParameterTarget, dim: int, rank: int, ranks: int) -> Sequence[Shard]:
        """Return one shard for each run of neighboring matrices of which this rank has the same share."""
        shards, start = [], 0
        parts = self._resolve(target.shape[dim], target.scope)
        for share, group in groupby(parts, key=lambda part: part.share(rank, ranks)):
            packed = tuple(part.size for part in group)
            part = DimShard(dim, share.index, share.count, packed, start=start)
            shards.append(Shard(target.name, target.shape, (part,), owner=share.owner, copies=share.copies))
            start += sum(packed)
        return shards


@dataclass(frozen=True)
class ColumnStyle(ShardedStyle):
    """Shard a parameter along its outputs."""

    def shard_dim(self, module: nn.Module, shape: Shape) -> int | None:
        """See `ShardedStyle.shard_dim`."""
        if len(shape) == 1 or isinstance(module, nn.Conv1d):
            return 0
        if isinstance(module, nn.Embedding | Conv1D):
            return 1
        return len(shape) - 2


@dataclass(frozen=True)
class RowStyle(ShardedStyle):
    """Shard a parameter along its inputs; vectors stay full."""

    def shard_dim(self, module: nn.Module, shape: Shape) -> int | None:
        """See `ShardedStyle.shard_dim`."""
        if len(shape) == 1:
            return None
        if isinstance(module, nn.Embedding | nn.Conv1d):
            return 1
        return 0 if isinstance(module, Conv1D) else len(shape) - 1


@dataclass(frozen=True)
class FullStyle(ParameterStyle):
    """Keep a parameter full on every rank."""


def padded_shard(target: ParameterTarget, dim: int, rank: int, ranks: int) -> Shard:
    """Return this rank's equal share of the vocabulary along `dim`; the last shares are padded."""
    return Shard(target.name, target.shape, (DimShard(dim, rank, ranks, (target.shape[dim],)),))
