"""Traces one forward pass of a model on the meta device: its layers, and the values that layers exchange.

Tensors have shapes and no values there. The trace records all information for a split into stages: the
order of its layers, the modules with weights that run before, between and after them, where each weight is used, and
which values that one layer computes are read by which later layers. So no family needs its own description.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.compat.torch.dispatch import Operation, has_several_forward_hooks, pytree, view_base
from trainer.compat.torch.meta import MetaMode, matrix_flops
from trainer.errors import PlanError, Problem, first_line
from trainer.model.meta import traceable
from trainer.pipeline.dataflow import BATCH, LENGTH, Dataflow, ModuleCall, Position, TensorSpec, TracedValue
from trainer.tasks import TASKS, example_ids

UNSPLITTABLE = {
    "reformer": "runs its layers in an autograd function of its own, which recomputes them from the last one",
}
"""Families that can be traced but not split, with the reason."""


@dataclass(frozen=True)
class _Unknown:
    """A source that no module returns."""

    what: str
    made: Position


_Sources = frozenset[TracedValue | _Unknown]


class _Tracer(MetaMode):
    """Records the inputs of every operation, and the sources of its result."""

    def __init__(self, model: nn.Module, layers: set[str]) -> None:
        self._layers = layers
        self._parameters = {id(p): name for name, p in model.named_parameters()}
        self._sources: dict[int, _Sources] = {}
        self._computed_in: dict[int, ModuleCall] = {}
        self._returned_by: dict[int, list[tuple[TracedValue, bool]]] = {}
        """The modules inside a layer that returned it, innermost first, and whether it has other hooks."""

        self._tensors: list[Any] = []
        """Every tensor, so that no identity is reused."""

        self._counts: Counter[str] = Counter()
        self._begun = 0
        self._active: list[ModuleCall] = []
        self._returned: dict[tuple[str, int], Any] = {}
        self._inside: list[str] = []
        """Running modules inside the layer, outermost first."""

        self.inner_flops: Counter[str] = Counter()
        self.calls: list[ModuleCall] = []
        self.layer_calls: list[str] = []
        self.reads: dict[TracedValue, set[Position]] = {}
        self.uses: dict[str, set[Position]] = {}
        self.unknown: dict[str, set[tuple[Position, Position]]] = {}
        self.structures: dict[tuple[str, int], Any] = {}

    # Modules ---------------------------------------------------------------------------------------------------------

    def enter_module(self, name: str, module: nn.Module) -> None:
        """Record that a module is called."""
        if self._active and self._active[-1].position.is_inside:
            self._inside.append(name)
        if self._active or not (name in self._layers or _owns_weights(module)):
            return
        is_layer = name in self._layers
        self._begun += is_layer
        call = ModuleCall(len(self.calls), name, self._counts[name], Position(self._begun, is_layer))
        self.calls.append(call)
        self._active.append(call)
        if is_layer:
            self.layer_calls.append(name)

    def leave_module(self, name: str, module: nn.Module, output: object, *, is_hooked: bool) -> None:
        """Record that a module returns `output`.

        Args:
            name: of the module.
            module: that returns.
            output: of any structure.
            is_hooked: whether others, such as recorders of Hugging Face, have hooks on the module.
        """
        occurrence = self._counts[name]
        self._counts[name] += 1
        if not self._active:
            return
        call = self._active[-1]
        if name != call.module and call.position.is_inside:
            assert self._inside.pop() == name
        leaves, structure = pytree.tree_flatten(output)
        tensors = [(number, leaf) for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if name != call.module:
            self._returned[name, occurrence] = structure, _leaves(leaves)
            for number, tensor in tensors:
                self._returned_by.setdefault(id(tensor), []).append(
                    (TracedValue(call.number, name, occurrence, number), is_hooked)
                )
            return
        for _, tensor in tensors:
            if self._computed_in.get(id(tensor)) is not call:  # passed through
                self._record_read(self._of(tensor))
        self._active.pop()
        call.output, call.leaves = structure, _leaves(leaves)
        for number, tensor in tensors:
            self._tensors.append(tensor)
            self._computed_in.pop(id(tensor), None)
            self._sources[id(tensor)] = frozenset({TracedValue(call.number, name, occurrence, number)})

    def finish(self, output: object) -> None:
        """Record that the model returns its output, which is read after the last layer."""
        for tensor in pytree.tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._record_read(self._of(tensor))

    # Operations ------------------------------------------------------------------------------------------------------

    def dispatch(self, func: Operation, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """See `DispatchMode.dispatch`."""
        read = [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
        sources: _Sources = frozenset().union(*(self._read(tensor) for tensor in read))
        result = super().dispatch(func, args, kwargs)
        if self._active:
            flops = matrix_flops(func, args, kwargs, result)
            self._active[-1].flops += flops
            for name in self._inside:
                self.inner_flops[name] += flops
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                changed = any(tensor is argument for argument in read)  # in place, maybe through a view
                self._set_source(tensor, sources)
                base = view_base(tensor)
                if changed and base is not None:
                    self._set_source(base, sources | self._sources.get(id(base), frozenset()))
        return result

    def _read(self, tensor: Tensor) -> _Sources:
        """Record that an operation reads a tensor; return the sources of its result."""
        if (name := self._parameters.get(id(tensor))) is not None:
            self.uses.setdefault(name, set()).add(self._here())
            return frozenset() if self._active else frozenset({_Unknown(f"a value computed from {name}", self._here())})
        sources = self._of(tensor)
        if not self._active:
            return sources
        self._record_read(sources)
        return frozenset()

    def _of(self, tensor: Tensor) -> _Sources:
        """Return the sources of a tensor: none if no weights contribute, or if the running call has computed it."""
        computed_in = self._computed_in.get(id(tensor))
        if computed_in is None:
            return self._sources.get(id(tensor), frozenset())
        if self._active and self._active[-1] is computed_in:
            return frozenset()
        returned_by = self._returned_by.get(id(tensor))
        if not returned_by:
            return frozenset({_Unknown(f"a value computed inside {computed_in.module}", computed_in.position)})
        value = next((value for value, is_hooked in returned_by if is_hooked), returned_by[-1][0])
        self.structures[value.module, value.occurrence] = self._returned[value.module, value.occurrence]
        return frozenset({value})

    def _record_read(self, sources: _Sources) -> None:
        for source in sources:
            if isinstance(source, _Unknown):
                self.unknown.setdefault(source.what, set()).add((source.made, self._here()))
            else:
                self.reads.setdefault(source, set()).add(self._here())

    def _set_source(self, tensor: Tensor, sources: _Sources) -> None:
        self._tensors.append(tensor)
        if self._active:
            self._computed_in[id(tensor)] = self._active[-1]
            self._sources.pop(id(tensor), None)
        else:
            self._computed_in.pop(id(tensor), None)
            self._sources[id(tensor)] = sources

    def _here(self) -> Position:
        return self._active[-1].position if self._active else Position(self._begun, is_inside=False)


def _leaves(leaves: list[Any]) -> tuple[TensorSpec | None, ...]:
    return tuple(TensorSpec(tuple(x.shape), x.is_floating_point()) if isinstance(x, Tensor) else None for x in leaves)


def _owns_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _layers(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Return the modules that are layers, with their (list, key).

    They lie in the outermost module lists with several matrices per module, and in lists of the same length next to
    these.
    """
    outermost: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in outermost):
            outermost[name] = module
    large = {name for name, stack in outermost.items() if len(stack) and _matrices(stack) >= 2 * len(stack)}
    lengths = {(name.rpartition(".")[0], len(outermost[name])) for name in large}
    return {
        f"{name}.{key}": (name, key)
        for name, stack in outermost.items()
        if (name.rpartition(".")[0], len(stack)) in lengths
        for key, child in stack.named_children()
        if any(True for _ in child.parameters())
    }


def _matrices(module: nn.Module) -> int:
    return sum(parameter.ndim > 1 for parameter in module.parameters())


def _units(layer_calls: list[str], layers: dict[str, tuple[str, str]]) -> Iterator[list[str]]:
    """Group the calls of layers into units: layers with the same index in several lists form one unit."""
    unit: list[str] = []
    for name in layer_calls:
        stack, key = layers[name]
        if unit and (layers[unit[-1]][1] != key or any(layers[other][0] == stack for other in unit)):
            yield unit
            unit = []
        unit.append(name)
    if unit:
        yield unit


def trace_dataflow(
    model: PreTrainedModel, inputs: dict[str, Tensor] | None = None, *, training: bool = True
) -> Dataflow:
    """Trace one forward pass of a model on the meta device.

    Args:
        model: whose tensors are on the meta device.
        inputs: on the meta device, of shapes (`BATCH`, length, ...); token ids of `LENGTH` by default.
        training: whether the model is in training mode.

    Raises:
        PlanError: if the model cannot be traced, has no sequence of layers, or runs a layer twice.
    """
    family = model.config.model_type
    if family in UNSPLITTABLE:
        raise PlanError(Problem("parallel.pipeline", f"{family} {UNSPLITTABLE[family]}", "Set parallel.pipeline to 1"))
    layers = _layers(model)
    tracer = _Tracer(model, set(layers))
    handles = []
    for name, module in model.named_modules():
        handles += _install_hooks(tracer, name, module)
    arguments: dict[str, Any] = dict(inputs or example_ids(model, BATCH, LENGTH))
    if "use_cache" in inspect.signature(model.forward).parameters:
        arguments["use_cache"] = False
    try:
        with traceable(model), torch.no_grad(), tracer:
            output = model.train(training)(**arguments)
            tracer.finish(output)
    except Exception as error:  # operations without values raise many types
        reason = f"{family} cannot be traced on the meta device: {first_line(error)}"
        raise PlanError(Problem("parallel.pipeline", reason, "Set parallel.pipeline to 1")) from None
    finally:
        for handle in handles:
            handle.remove()
    twice = [name for name, count in Counter(tracer.layer_calls).items() if count > 1]
    units = [tuple(unit) for unit in _units(tracer.layer_calls, layers)]
    if twice or len(units) < 2:
        reason = (
            f"{family} runs {twice[0]} several times" if twice else f"{family} has no list of layers that run in a row"
        )
        raise PlanError(Problem("parallel.pipeline", reason, "Set parallel.pipeline to 1"))
    numbers = [number for number, unit in enumerate(units) for _ in unit]
    return Dataflow(
        units,
        tracer.calls,
        tracer.structures,
        dict(tracer.inner_flops),
        numbers,
        tracer.reads,
        tracer.uses,
        tracer.unknown,
    )


def trace_training_and_evaluation(model: PreTrainedModel, task: str) -> tuple[Dataflow, Dataflow]:
    """Trace a forward pass in training, and one in evaluation over sequences of twice the length.

    The difference in length tells apart costs that grow linearly and quadratically with it.

    Args:
        model: on the meta device.
        task: `model.task`, which provides the inputs.
    """
    inputs = TASKS[task].example_inputs
    training = trace_dataflow(model, inputs(model, BATCH, LENGTH))
    return training, trace_dataflow(model, inputs(model, BATCH, 2 * LENGTH), training=False)


def _install_hooks(tracer: _Tracer, name: str, module: nn.Module) -> list[Any]:
    def enter(module: nn.Module, args: object) -> None:
        tracer.enter_module(name, module)

    def leave(module: nn.Module, args: object, output: object) -> None:
        tracer.leave_module(name, module, output, is_hooked=has_several_forward_hooks(module))

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
