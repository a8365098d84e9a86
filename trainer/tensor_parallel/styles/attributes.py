"""Styles that change the attributes of a module, and conditions of a plan."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from transformers import PreTrainedConfig

from trainer.errors import PlanError, Problem
from trainer.tensor_parallel.region import Region
from trainer.tensor_parallel.styles.base import ModuleStyle, ModuleTarget
from trainer.tensor_parallel.units import Scope, check_expression


@dataclass(frozen=True)
class Attribute:
    """An attribute of a module that is divided by the number of ranks."""

    name: str
    in_config: bool = False
    """Whether it is in the module's configuration, of which the module gets a copy."""

    optional: bool = False
    """Whether some of the modules lack it."""

    def __str__(self) -> str:
        return f"{'config.' if self.in_config else ''}{self.name}{'?' if self.optional else ''}"

    def divide(self, region: Region, target: ModuleTarget) -> None:
        """Divide it in the module.

        Raises:
            PlanError: if the module has no such number, or it can neither be divided nor shared.
        """
        holder: Any = target.module
        if self.in_config:
            holder = target.module.config = copy.copy(target.module.config)
        value = getattr(holder, self.name, None)
        if value is None and self.optional:
            return
        if not isinstance(value, int):
            reason = f"{target.name} has no number '{self.name}' to divide"
            raise PlanError(Problem("parallel.tensor_plan", reason))
        if value % region.ranks and region.ranks % value:
            reason = f"{target.name}.{self.name} = {value} cannot be divided by {region.ranks}"
            raise PlanError(Problem("parallel.tensor", reason))
        setattr(holder, self.name, max(1, value // region.ranks))


@dataclass(frozen=True)
class Computed:
    """An attribute of a module that is computed again from divided attributes."""

    name: str
    expression: str
    optional: bool = False

    def __post_init__(self) -> None:
        check_expression(self.expression)

    def __str__(self) -> str:
        return f"{self.name}{'?' if self.optional else ''}={self.expression}"

    def divide(self, region: Region, target: ModuleTarget) -> None:
        """Compute it in the module."""
        if not self.optional or hasattr(target.module, self.name):
            setattr(target.module, self.name, Scope(target.module).number(self.expression))


@dataclass(frozen=True, init=False)
class Divide(ModuleStyle):
    """Numbers of heads or sizes, divided by the ranks: `divide:name,config.name,of_some?,name=a*b+c`."""

    name: ClassVar[str] = "divide"
    allows_sharded_sequence: ClassVar[bool] = True

    items: tuple[Attribute | Computed, ...]

    def __init__(self, *items: str | Attribute | Computed) -> None:
        """Take attributes, by name or with options, in the order of their computation."""
        object.__setattr__(self, "items", tuple(Attribute(i) if isinstance(i, str) else i for i in items))

    @classmethod
    def parse(cls, argument: str) -> Self:
        """Read items with commas between them."""
        return cls(*(cls._parse_item(item.strip()) for item in argument.split(",")))

    @staticmethod
    def _parse_item(text: str) -> Attribute | Computed:
        name, is_computed, expression = text.partition("=")
        optional = name.endswith("?")
        name = name.removesuffix("?")
        if is_computed:
            return Computed(name, expression, optional)
        return Attribute(name.removeprefix("config."), in_config=name.startswith("config."), optional=optional)

    @property
    def argument(self) -> str:
        """See `Style.argument`."""
        return ",".join(str(item) for item in self.items)

    def install(self, region: Region, target: ModuleTarget) -> None:
        """See `Style.install`."""
        for item in self.items:
            item.divide(region, target)


@dataclass(frozen=True)
class Requires(ModuleStyle):
    """A field of the configuration with the only value for which the plan is right: `needs:field=value`."""

    name: ClassVar[str] = "needs"

    field: str
    value: str

    @classmethod
    def parse(cls, argument: str) -> Self:
        """Read a field and its value."""
        field, separator, value = argument.partition("=")
        if not separator:
            raise ValueError("'needs' takes field=value")
        return cls(field, value)

    @property
    def argument(self) -> str:
        """See `Style.argument`."""
        return f"{self.field}={self.value}"

    def is_met(self, config: PreTrainedConfig) -> bool:
        """Return whether the configuration has the value."""
        return str(getattr(config, self.field, None)) == self.value


@dataclass(frozen=True)
class Unfused(ModuleStyle):
    """Not the one kernel for all its layers, which would leave out the sums: `unfused[:child it must have]`."""

    name: ClassVar[str] = "unfused"
    allows_sharded_sequence: ClassVar[bool] = True

    child: str = ""

    @classmethod
    def parse(cls, argument: str) -> Self:
        """Read the name of a child."""
        return cls(argument)

    @property
    def argument(self) -> str:
        """See `Style.argument`."""
        return self.child

    def install(self, region: Region, target: ModuleTarget) -> None:
        """Make the training flag of the module always false, because only training mode takes the fused path."""
        if self.child and not hasattr(target.module, self.child):
            return
        module_class = type(target.module)
        never = property(lambda self: False, lambda self, value: None)
        target.module.__class__ = type(module_class.__name__, (module_class,), {"training": never})
