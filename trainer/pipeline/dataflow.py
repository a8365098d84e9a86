"""What one forward pass of a model does: its layers in their order, where weights are used, what goes between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from trainer.errors import PlanError, Problem

BATCH, LENGTH = 3, 13
"""Of the ids that are followed: sizes that are hardly any of a model's own, so that they are known again in shapes."""


class Position(NamedTuple):
    """Where in the forward pass something happens."""

    layers_begun: int
    """Layers that have begun by then."""

    is_inside: bool
    """Whether inside the last of them, or behind it."""


class TensorSpec(NamedTuple):
    """A tensor among what a module returns."""

    shape: tuple[int, ...]
    is_floating: bool
    """Floating point, so that it has a gradient."""


@dataclass
class ModuleCall:
    """A module that has weights was called: a layer, or one beside the layers."""

    number: int
    module: str
    occurrence: int
    """How many times it had been called before."""

    position: Position
    output: Any = None
    """What it returned: a pytree's structure."""

    leaves: tuple[TensorSpec | None, ...] = ()
    """Of that; None for what is no tensor."""

    flops: int = 0
    """Of its matrix products."""


class TracedValue(NamedTuple):
    """A tensor that a call made, as the others know it."""

    call: int
    module: str
    """The called module, or one inside it."""

    occurrence: int
    leaf: int
    """Its number among the leaves of what the module returned."""


@dataclass
class Dataflow:
    """What one forward pass does; read by unit: a layer, or several modules that make one together."""

    units: list[tuple[str, ...]]
    """Names of the modules of each unit, in the order in which they run."""

    calls: list[ModuleCall]
    structures: dict[tuple[str, int], tuple[Any, tuple[TensorSpec | None, ...]]]
    """What a module inside a layer returned in its nth call, where others read it: structure, and leaves."""

    inner_flops: dict[str, int]
    """FLOPs of the matrix products of each module inside a layer."""

    _layers: list[int]
    """Unit of each layer call."""

    _reads: dict[TracedValue, set[Position]]
    _uses: dict[str, set[Position]]
    _unknown: dict[str, set[tuple[Position, Position]]]
    """Values that no module gives, by what they are: where made, and where read."""

    def unit(self, position: Position) -> int:
        """The unit that something is part of; what is beside the layers belongs with the next one, or the last."""
        number = position.layers_begun - 1 if position.is_inside else position.layers_begun
        return self._layers[min(number, len(self._layers) - 1)]

    def costs(self, length: int, longer: Dataflow) -> list[float]:
        """FLOPs of each unit's forward pass, and of what belongs with it, for one sequence of `length` tokens.

        Those of one length grow with it, or with its square (attention); a second flow over twice the length tells
        them apart. Where kernels compute in chunks, longer than both, the work of twice the length is less than
        twice: then it is taken to grow with the length alone.
        """
        costs = [0.0] * len(self.units)
        for short, long in zip(self.calls, longer.calls, strict=True):
            share = length / LENGTH
            squared = max(0.0, (long.flops - 2 * short.flops) / 2)
            linear = (long.flops - 4 * squared) / 2
            costs[self.unit(short.position)] += (linear * share + squared * share**2) / BATCH
        return costs

    def attention_modules(self, longer: Dataflow) -> list[str]:
        """The outermost modules inside the layers whose work grows with the square of the sequence: attention.

        Args:
            longer: over twice the length.
        """
        squared = [name for name, flops in self.inner_flops.items() if longer.inner_flops.get(name, 0) > 2 * flops]
        return [name for name in squared if not any(name.startswith(f"{outer}.") for outer in squared)]

    def units_using(self, parameter: str) -> set[int]:
        """Units that use a parameter, by its first name; none where nothing does."""
        return {self.unit(position) for position in self._uses.get(parameter, ())}

    def spec_of(self, value: TracedValue) -> TensorSpec:
        """Shape and kind of a value."""
        call = self.calls[value.call]
        leaves = call.leaves if value.module == call.module else self.structures[value.module, value.occurrence][1]
        leaf = leaves[value.leaf]
        assert leaf is not None
        return leaf

    def boundary_values(self, cut: int) -> list[TracedValue]:
        """Values that are made before unit `cut` and read at it or behind it, in the order in which they are made.

        Raises:
            PlanError: if one is among them that no module gives.
        """
        for what, ways in self._unknown.items():
            if any(self.unit(made) < cut <= self.unit(read) for made, read in ways):
                raise PlanError(
                    Problem("parallel.pipeline", f"{what} is read behind layer {cut}, and cannot travel there",
                            "Set parallel.pipeline to 1")
                )  # fmt: skip
        crossing = (
            value
            for value, places in self._reads.items()
            if self.unit(self.calls[value.call].position) < cut
            and any(self.unit(position) >= cut for position in places)
        )
        return sorted(crossing)
