"""Styles that shard a weight along its outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import nn

from trainer.tensor_parallel import collectives
from trainer.tensor_parallel.hooks import on_inputs, on_output
from trainer.tensor_parallel.region import Region
from trainer.tensor_parallel.styles.base import ColumnStyle, ModuleTarget
from trainer.tensor_parallel.units import split_unit


@dataclass(frozen=True)
class _Column(ColumnStyle):
    """A column layer: its input enters the region, and its output is sharded."""

    def install(self, region: Region, target: ModuleTarget) -> None:
        """See `Style.install`."""
        if isinstance(target.module, nn.Embedding):
            return  # token ids have no gradient
        if list(target.module.parameters(recurse=False)):
            on_inputs(target.module, region.column_input_hook(target.module))


@dataclass(frozen=True)
class _InUnits(ColumnStyle):
    """A column style whose argument, if it is a single size, is the size of a unit."""

    @classmethod
    def parse(cls, argument: str) -> Self:
        """Read the size of a unit, or what `ShardedStyle.parse` reads."""
        if argument and not split_unit(argument)[1]:
            return cls(unit=argument)
        return super().parse(argument)

    @property
    def argument(self) -> str:
        """See `Style.argument`."""
        return self.unit if self.unit and self._count == 1 else super().argument


@dataclass(frozen=True)
class Column(_InUnits, _Column):
    """Outputs sharded, in whole units: `colwise[:size of a unit]`."""

    name: ClassVar[str] = "colwise"
    starts_region: ClassVar[bool] = True
    allows_sharded_sequence: ClassVar[bool] = True


@dataclass(frozen=True)
class KeyValueColumn(_InUnits, _Column):
    """As colwise; where there are fewer units than ranks, ranks share one: `kv_colwise:size of a unit`."""

    name: ClassVar[str] = "kv_colwise"
    starts_region: ClassVar[bool] = True
    allows_sharded_sequence: ClassVar[bool] = True
    shares_units: ClassVar[bool] = True


@dataclass(frozen=True)
class PackedColumn(_Column):
    """Several matrices in one, the outputs of each sharded: `packed_colwise[:how many, or their parts]`."""

    name: ClassVar[str] = "packed_colwise"
    starts_region: ClassVar[bool] = True
    allows_sharded_sequence: ClassVar[bool] = True
    default_count: ClassVar[int] = 2


@dataclass(frozen=True)
class ColumnGatherOutput(_InUnits):
    """As colwise, with the outputs gathered again: `colwise_gather_output[:size of a unit]`."""

    name: ClassVar[str] = "colwise_gather_output"
    starts_region: ClassVar[bool] = True

    def install(self, region: Region, target: ModuleTarget) -> None:
        """See `Style.install`."""
        if not list(target.module.parameters(recurse=False)):
            return  # an identity instead of the layer
        on_inputs(target.module, region.enter)
        on_output(target.module, lambda output: collectives.gather_from_region(output, -1, region.group))
