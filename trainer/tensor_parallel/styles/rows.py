"""Styles that shard a weight along its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trainer.errors import PlanError, Problem
from trainer.tensor_parallel import collectives
from trainer.tensor_parallel.hooks import on_inputs, on_output
from trainer.tensor_parallel.layers import make_row
from trainer.tensor_parallel.region import Region
from trainer.tensor_parallel.styles.base import ModuleTarget, RowStyle


@dataclass(frozen=True)
class _Row(RowStyle):
    """A row layer: its input is sharded, and its output is summed over the ranks."""

    allows_sharded_sequence: ClassVar[bool] = True

    def install(self, region: Region, target: ModuleTarget) -> None:
        """See `Style.install`."""
        make_row(target.module, region.row_output_hook(target.module))


@dataclass(frozen=True)
class Row(_Row):
    """Inputs sharded, outputs summed: `rowwise`."""

    name: ClassVar[str] = "rowwise"


@dataclass(frozen=True)
class PackedRow(_Row):
    """As rowwise, the inputs being several joined ones: `packed_rowwise[:how many, or their parts]`."""

    name: ClassVar[str] = "packed_rowwise"
    default_count: ClassVar[int] = 2


@dataclass(frozen=True)
class RowSplitInput(RowStyle):
    """As rowwise, of an input that is full: `rowwise_split_input`."""

    name: ClassVar[str] = "rowwise_split_input"

    def install(self, region: Region, target: ModuleTarget) -> None:
        """See `Style.install`."""
        on_inputs(target.module, lambda x: collectives.split_to_region(x, -1, region.group))
        make_row(target.module, region.row_output_hook(target.module))


@dataclass(frozen=True)
class RowEnterOutput(RowStyle):
    """As rowwise, the output entering the region again, for the sharded weights that read it: `rowwise_enter`."""

    name: ClassVar[str] = "rowwise_enter"

    def install(self, region: Region, target: ModuleTarget) -> None:
        """See `Style.install`."""
        make_row(target.module, lambda output: collectives.enter_region(region.reduce(output), region.group))


@dataclass(frozen=True)
class RowScatterOutput(RowStyle):
    """As rowwise, with each rank getting its part of the sum: `rowwise_scatter_output`."""

    name: ClassVar[str] = "rowwise_scatter_output"

    def install(self, region: Region, target: ModuleTarget) -> None:
        """See `Style.install`."""
        if getattr(target.module, "bias", None) is not None:
            reason = f"{target.name} has a bias, and cannot scatter its outputs"
            raise PlanError(Problem("parallel.tensor_plan", reason))
        on_output(target.module, lambda output: collectives.reduce_scatter_sequence(output, -1, region.group))
