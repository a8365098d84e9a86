"""Styles for the beginning and end of a tensor-parallel region at a module."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from trainer.distributed.collectives import local_slice
from trainer.tensor_parallel import collectives
from trainer.tensor_parallel.hooks import on_argument, on_inputs, on_output
from trainer.tensor_parallel.region import Region
from trainer.tensor_parallel.styles.base import ModuleStyle, ModuleTarget
from trainer.tensor_parallel.units import parse_integer


@dataclass(frozen=True)
class ReduceOutput(ModuleStyle):
    """The module's output is summed over ranks: `all_reduce`."""

    name: ClassVar[str] = "all_reduce"

    def install(self, region: Region, target: ModuleTarget) -> None:
        """See `Style.install`."""
        on_output(target.module, region.reduce)


@dataclass(frozen=True)
class EnterInput(ModuleStyle):
    """The module's inputs enter a region: `enter`."""

    name: ClassVar[str] = "enter"
    starts_region: ClassVar[bool] = True

    def install(self, region: Region, target: ModuleTarget) -> None:
        """See `Style.install`."""
        on_inputs(target.module, lambda x: region.enter(x) if x.requires_grad else x)


@dataclass(frozen=True)
class EnterThrough(ModuleStyle):
    """The module's inputs enter a region, and its output is in it, so that its users are 'inside': `enter_through`."""

    name: ClassVar[str] = "enter_through"

    def install(self, region: Region, target: ModuleTarget) -> None:
        """See `Style.install`."""
        on_inputs(target.module, lambda x: x if region.is_sequence_sharded else region.enter(x))


@dataclass(frozen=True)
class InsideRegion(ModuleStyle):
    """A column layer whose input is in the region already: `inside`."""

    name: ClassVar[str] = "inside"
    allows_sharded_sequence: ClassVar[bool] = True

    def install(self, region: Region, target: ModuleTarget) -> None:
        """See `Style.install`."""
        region.skip_input_reduce(target.module)


@dataclass(frozen=True)
class ParallelResidual(ModuleStyle):
    """A block that adds two branches, whose row layers share one sum: `parallel_residual:first,second`."""

    name: ClassVar[str] = "parallel_residual"

    first: str
    """Name in the block of the row layer that is computed first."""

    second: str

    @classmethod
    def parse(cls, argument: str) -> Self:
        """Read two names."""
        first, separator, second = argument.partition(",")
        if not separator:
            raise ValueError("'parallel_residual' takes first,second")
        return cls(first, second)

    @property
    def argument(self) -> str:
        """See `Style.argument`."""
        return f"{self.first},{self.second}"

    def install(self, region: Region, target: ModuleTarget) -> None:
        """See `Style.install`."""
        region.fuse_reductions(target.module.get_submodule(self.first), target.module.get_submodule(self.second))


@dataclass(frozen=True)
class EnterOutput(ModuleStyle):
    """The module's output enters a region: `enter_output[:which of several]`."""

    name: ClassVar[str] = "enter_output"

    index: int | None = None

    @classmethod
    def parse(cls, argument: str) -> Self:
        """Read an index."""
        return cls(parse_integer(argument) if argument else None)

    @property
    def argument(self) -> str:
        """See `Style.argument`."""
        return "" if self.index is None else str(self.index)

    def install(self, region: Region, target: ModuleTarget) -> None:
        """See `Style.install`."""
        index = self.index
        if index is None:
            on_output(target.module, region.enter)
            return

        def hook(_: nn.Module, __: tuple[Any, ...], outputs: tuple[Any, ...]) -> tuple[Any, ...]:
            entered = collectives.enter_region(outputs[index], region.group)
            return (*outputs[:index], entered, *outputs[index + 1 :])

        target.module.register_forward_hook(hook)


@dataclass(frozen=True)
class GatherOutput(ModuleStyle):
    """The module's output is sharded, and gathered: `gather_output`."""

    name: ClassVar[str] = "gather_output"

    def install(self, region: Region, target: ModuleTarget) -> None:
        """See `Style.install`."""
        on_output(target.module, lambda output: collectives.gather_from_region(output, -1, region.group))


@dataclass(frozen=True)
class GatherInput(ModuleStyle):
    """A sharded input is gathered for a module that needs it full: `gather_input`."""

    name: ClassVar[str] = "gather_input"

    def install(self, region: Region, target: ModuleTarget) -> None:
        """See `Style.install`."""
        features = getattr(target.module, "in_features", None)
        on_inputs(target.module, lambda x: x if x.shape[-1] == features else region.restore_input(x))


@dataclass(frozen=True)
class NarrowInput(ModuleStyle):
    """The first input is sliced, for its size only; column layers inside have gather_input, too: `narrow_input`."""

    name: ClassVar[str] = "narrow_input"

    def install(self, region: Region, target: ModuleTarget) -> None:
        """Give a module that derives the shape of its result from its input the size of this rank's part.

        Its column layers get the full input back, and no gradient passes through the slice.
        """
        first = next(iter(inspect.signature(target.module.forward).parameters))
        on_argument(target.module, first, region.slice_input)


@dataclass(frozen=True)
class ResidualInside(ModuleStyle):
    """The module adds its input to a partial sum and passes that to a child: `residual_inside:child`."""

    name: ClassVar[str] = "residual_inside"

    child: str

    @classmethod
    def parse(cls, argument: str) -> Self:
        """Read the name of a child."""
        return cls(argument)

    @property
    def argument(self) -> str:
        """See `Style.argument`."""
        return self.child

    def install(self, region: Region, target: ModuleTarget) -> None:
        """Correct the sum of a module that computes `child(h + partial sum)` of its input h.

        Each rank adds h, so all but one are subtracted from the sum. They are subtracted outside the region, which
        leaves the gradient of h full.
        """
        inputs: list[Tensor] = []

        def enter(x: Tensor) -> Tensor:
            inputs.append(x)
            return region.enter(x)

        def reduce(x: Tensor) -> Tensor:
            return region.reduce(x) - (region.ranks - 1) * inputs.pop(0)

        target.module.register_forward_pre_hook(lambda *_: inputs.clear())
        on_inputs(target.module, lambda x: enter(x) if x.requires_grad else x)
        on_inputs(target.module.get_submodule(self.child), reduce)


@dataclass(frozen=True)
class SplitOutput(ModuleStyle):
    """The output is full and its users need their part: `split_output[:which of several:dimension]`."""

    name: ClassVar[str] = "split_output"

    index: int | None = None
    """Which of several outputs; None for the only one."""

    dim: int = -1

    @classmethod
    def parse(cls, argument: str) -> Self:
        """Read an index and a dimension."""
        if not argument:
            return cls()
        index, _, dim = argument.partition(":")
        return cls(parse_integer(index), parse_integer(dim))

    @property
    def argument(self) -> str:
        """See `Style.argument`."""
        return "" if self.index is None else f"{self.index}:{self.dim}"

    def install(self, region: Region, target: ModuleTarget) -> None:
        """See `Style.install`."""
        index, dim = self.index, self.dim
        if index is None:
            on_output(target.module, lambda output: collectives.split_to_region(output, dim, region.group))
            return

        def hook(_: nn.Module, __: tuple[Any, ...], outputs: tuple[Any, ...]) -> tuple[Any, ...]:
            part = collectives.split_to_region(outputs[index], dim, region.group)
            return (*outputs[:index], part, *outputs[index + 1 :])

        target.module.register_forward_hook(hook)


@dataclass(frozen=True)
class SplitInput(ModuleStyle):
    """Of a full argument each rank needs its heads: `split_input:argument:dimension[:heads in it]`."""

    name: ClassVar[str] = "split_input"
    allows_sharded_sequence: ClassVar[bool] = True

    parameter: str
    """Name of the argument in the module's `forward`."""

    dim: int
    heads: str = ""
    """Attribute of the module with the number of its heads, where the dimension is (batch x heads)."""

    @classmethod
    def parse(cls, argument: str) -> Self:
        """Read a name, a dimension and an attribute."""
        name, _, rest = argument.partition(":")
        dim, _, heads = rest.partition(":")
        return cls(name, parse_integer(dim), heads)

    @property
    def argument(self) -> str:
        """See `Style.argument`."""
        return ":".join([self.parameter, str(self.dim), *([self.heads] if self.heads else [])])

    def install(self, region: Region, target: ModuleTarget) -> None:
        """See `Style.install`."""
        dim = self.dim
        heads = getattr(target.module, self.heads) if self.heads else None

        def split(value: Tensor) -> Tensor:
            if value.shape[dim] == 1:  # one for all heads
                return value
            if heads is None:
                return local_slice(value, dim, region.group)
            shape = (*value.shape[:dim], -1, heads * region.ranks, *value.shape[dim + 1 :])
            grouped = value.reshape(shape)
            return local_slice(grouped, dim + 1, region.group).flatten(dim, dim + 1)

        on_argument(target.module, self.parameter, split)
