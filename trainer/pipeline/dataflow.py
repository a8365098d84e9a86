"""Dataflow of one forward pass: layers in order, where weights are used, and which values layers exchange."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from trainer.errors import PlanError, Problem

BATCH, LENGTH = 3, 13
"""Shape of the traced ids: primes unlikely to equal a dimension of a model, so that shapes reveal batch and length."""


class Position(NamedTuple):
    """Position in the forward pass, in layers."""

    layers_begun: int
    """Layers that have started by then."""

    is_inside: bool
    """Whether the last of them is still running."""


class TensorSpec(NamedTuple):
    """Shape and type of a tensor in the output of a module."""

    shape: tuple[int, ...]
    is_floating: bool
    """Whether the tensor has a gradient."""


@dataclass
class ModuleCall:
    """A call of a module with weights: a layer, or a module outside layers."""

    number: int
    module: str
    occurrence: int
    """Number of earlier calls of the module."""

    position: Position
    output: Any = None
    """Structure (pytree) of the output."""

    leaves: tuple[TensorSpec | None, ...] = ()
    """Leaves of the output; None for leaves that are not tensors."""

    flops: int = 0
    """FLOPs of its matrix products."""


class TracedValue(NamedTuple):
    """A tensor that a call computed, identified by its position in the output of a module."""

    call: int
    module: str
    """The called module, or a module inside it."""

    occurrence: int
    leaf: int
    """Index among the leaves of the module's output."""


@dataclass
class Dataflow:
    """Dataflow of one forward pass, by unit: a layer, or several modules that together form one."""

    units: list[tuple[str, ...]]
    """Module names of each unit, in execution order."""

    calls: list[ModuleCall]
    structures: dict[tuple[str, int], tuple[Any, tuple[TensorSpec | None, ...]]]
    """By (module, occurrence), the output of modules inside layers that others read: structure and leaves."""

    inner_flops: dict[str, int]
    """FLOPs of matrix products by module inside a layer."""

    _layers: list[int]
    """Unit of each call of a layer."""

    _reads: dict[TracedValue, set[Position]]
    _uses: dict[str, set[Position]]
    _unknown: dict[str, set[tuple[Position, Position]]]
    """Values that no module returns, by description: where they are computed, and where they are read."""

    def unit(self, position: Position) -> int:
        """Return the unit of a position. Between layers it is the next unit, and at the end the last one."""
        number = position.layers_begun - 1 if position.is_inside else position.layers_begun
        return self._layers[min(number, len(self._layers) - 1)]

    def costs(self, length: int, longer: Dataflow) -> list[float]:
        """Return the FLOPs of each unit's forward pass for one sequence of `length` tokens.

        FLOPs grow linearly with the length, or quadratically (attention). The trace over twice the length tells them
        apart. Kernels that compute in chunks longer than both sequences do less than twice the work for twice the
        length; then all of it is taken to be linear.

        Args:
            length: tokens of the sequence.
            longer: the dataflow over twice the length.
        """
        costs = [0.0] * len(self.units)
        for short, long in zip(self.calls, longer.calls, strict=True):
            share = length / LENGTH
            squared = max(0.0, (long.flops - 2 * short.flops) / 2)
            linear = (long.flops - 4 * squared) / 2
            costs[self.unit(short.position)] += (linear * share + squared * share**2) / BATCH
        return costs

    def attention_modules(self, longer: Dataflow) -> list[str]:
        """Return the outermost modules inside layers whose FLOPs grow quadratically with the length: attention.

        Args:
            longer: the dataflow over twice the length.
        """
        squared = [name for name, flops in self.inner_flops.items() if longer.inner_flops.get(name, 0) > 2 * flops]
        return [name for name in squared if not any(name.startswith(f"{outer}.") for outer in squared)]

    def units_using(self, parameter: str) -> set[int]:
        """Return the units that use a parameter, given by its first name."""
        return {self.unit(position) for position in self._uses.get(parameter, ())}

    def spec_of(self, value: TracedValue) -> TensorSpec:
        """Return shape and type of a value."""
        call = self.calls[value.call]
        leaves = call.leaves if value.module == call.module else self.structures[value.module, value.occurrence][1]
        leaf = leaves[value.leaf]
        assert leaf is not None
        return leaf

    def boundary_values(self, cut: int) -> list[TracedValue]:
        """Return the values that are computed before unit `cut` and read in it or later, in order of computation.

        Raises:
            PlanError: if no module returns one of them, so that it cannot be sent.
        """
        for what, ways in self._unknown.items():
            if any(self.unit(made) < cut <= self.unit(read) for made, read in ways):
                reason = f"{what} is read after layer {cut}, and cannot be sent to another stage"
                raise PlanError(Problem("parallel.pipeline", reason, "Set parallel.pipeline to 1"))
        crossing = (
            value
            for value, positions in self._reads.items()
            if self.unit(self.calls[value.call].position) < cut
            and any(self.unit(position) >= cut for position in positions)
        )
        return sorted(crossing)
