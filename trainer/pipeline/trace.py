"""Follows a model through one forward pass without computing it: which layers there are, and what goes between them.

The model runs on the meta device, where tensors have shapes and no values. What is noted is all that a cut into stages
has to know of a family: in which order its layers run, which modules with weights run before, between and behind them,
where each weight is used, and which values that one layer makes are read by which later ones. Nobody writes it down by
family.
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

from trainer.compat.torch.dispatch import pytree, view_base
from trainer.errors import PlanError, Problem, first_line
from trainer.model.meta import MetaMode, matrix_flops, traceable
from trainer.pipeline.dataflow import BATCH, LENGTH, Dataflow, ModuleCall, Position, TensorSpec, TracedValue
from trainer.tasks import TASKS, example_ids

UNSPLITTABLE = {
    "reformer": "runs its layers in an autograd function of its own, which computes them again from the last one",
}
"""Families that can be followed and yet not divided, and why."""


@dataclass(frozen=True)
class _Unknown:
    """A source that no module gives."""

    what: str
    made: Position


_Sources = frozenset[TracedValue | _Unknown]


class _Follower(MetaMode):
    """Notes every operation: what it reads, and where its result comes from."""

    def __init__(self, model: nn.Module, layers: set[str]) -> None:
        self._layers = layers
        self._parameters = {id(p): name for name, p in model.named_parameters()}
        self._sources: dict[int, _Sources] = {}
        self._made_in: dict[int, ModuleCall] = {}
        self._given_by: dict[int, list[tuple[TracedValue, bool]]] = {}
        """Modules inside a layer that gave a tensor, innermost first, and whether somebody else listens to them."""

        self._kept: list[Any] = []
        """Every tensor, so that no identity is used twice."""

        self._counts: Counter[str] = Counter()
        self._begun = 0
        self._active: list[ModuleCall] = []
        self._returned: dict[tuple[str, int], Any] = {}
        self._inside: list[str] = []
        """Modules at work inside the layer, outermost first."""

        self.inner_flops: Counter[str] = Counter()
        self.calls: list[ModuleCall] = []
        self.layer_calls: list[str] = []
        self.reads: dict[TracedValue, set[Position]] = {}
        self.uses: dict[str, set[Position]] = {}
        self.unknown: dict[str, set[tuple[Position, Position]]] = {}
        self.structures: dict[tuple[str, int], Any] = {}

    # Modules ---------------------------------------------------------------------------------------------------------

    def enters(self, name: str, module: nn.Module) -> None:
        """A module is called."""
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

    def returns(self, name: str, module: nn.Module, output: Any, *, heard: bool) -> None:
        """A module returns `output`; `heard` if hooks of others, such as Hugging Face's recorders, listen to it."""
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
                self._given_by.setdefault(id(tensor), []).append(
                    (TracedValue(call.number, name, occurrence, number), heard)
                )
            return
        for _, tensor in tensors:
            if self._made_in.get(id(tensor)) is not call:  # it hands through what it was given
                self._note(self._of(tensor))
        self._active.pop()
        call.output, call.leaves = structure, _leaves(leaves)
        for number, tensor in tensors:
            self._kept.append(tensor)
            self._made_in.pop(id(tensor), None)
            self._sources[id(tensor)] = frozenset({TracedValue(call.number, name, occurrence, number)})

    def ends(self, output: Any) -> None:
        """The model returns; whoever asked for its output reads it behind the last layer."""
        for tensor in pytree.tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._note(self._of(tensor))

    # Operations ------------------------------------------------------------------------------------------------------

    def dispatch(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """See `DispatchMode.dispatch`."""
        given = [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
        sources: _Sources = frozenset().union(*(self._read(tensor) for tensor in given))
        result = super().dispatch(func, args, kwargs)
        if self._active:
            flops = matrix_flops(func, args, kwargs, result)
            self._active[-1].flops += flops
            for name in self._inside:
                self.inner_flops[name] += flops
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                changed = any(tensor is one for one in given)  # in place, maybe through a view
                self._make(tensor, sources)
                base = view_base(tensor)
                if changed and base is not None:
                    self._make(base, sources | self._sources.get(id(base), frozenset()))
        return result

    def _read(self, tensor: Tensor) -> _Sources:
        """Notes that an operation reads `tensor`. Returns what its result then comes from."""
        if (name := self._parameters.get(id(tensor))) is not None:
            self.uses.setdefault(name, set()).add(self._here())
            return frozenset() if self._active else frozenset({_Unknown(f"a value made with {name}", self._here())})
        sources = self._of(tensor)
        if not self._active:
            return sources
        self._note(sources)
        return frozenset()

    def _of(self, tensor: Tensor) -> _Sources:
        """Where a tensor comes from; from nowhere, where no weights are behind it or the call at work has made it."""
        made_in = self._made_in.get(id(tensor))
        if made_in is None:
            return self._sources.get(id(tensor), frozenset())
        if self._active and self._active[-1] is made_in:
            return frozenset()
        given_by = self._given_by.get(id(tensor))
        if not given_by:
            return frozenset({_Unknown(f"a value made inside {made_in.module}", made_in.position)})
        value = next((value for value, heard in given_by if heard), given_by[-1][0])
        self.structures[value.module, value.occurrence] = self._returned[value.module, value.occurrence]
        return frozenset({value})

    def _note(self, sources: _Sources) -> None:
        for source in sources:
            if isinstance(source, _Unknown):
                self.unknown.setdefault(source.what, set()).add((source.made, self._here()))
            else:
                self.reads.setdefault(source, set()).add(self._here())

    def _make(self, tensor: Tensor, sources: _Sources) -> None:
        self._kept.append(tensor)
        if self._active:
            self._made_in[id(tensor)] = self._active[-1]
            self._sources.pop(id(tensor), None)
        else:
            self._made_in.pop(id(tensor), None)
            self._sources[id(tensor)] = sources

    def _here(self) -> Position:
        return self._active[-1].position if self._active else Position(self._begun, is_inside=False)


def _leaves(leaves: list[Any]) -> tuple[TensorSpec | None, ...]:
    return tuple(TensorSpec(tuple(x.shape), x.is_floating_point()) if isinstance(x, Tensor) else None for x in leaves)


def _owns_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _layers(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Modules that are layers, with their (list, key): those in the outermost lists of modules with several matrices,
    and in lists beside these of the same length."""
    outermost: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in outermost):
            outermost[name] = module
    large = {name for name, stack in outermost.items() if len(stack) and _matrices(stack) >= 2 * len(stack)}
    beside = {(name.rpartition(".")[0], len(outermost[name])) for name in large}
    return {
        f"{name}.{key}": (name, key)
        for name, stack in outermost.items()
        if (name.rpartition(".")[0], len(stack)) in beside
        for key, child in stack.named_children()
        if any(True for _ in child.parameters())
    }


def _matrices(module: nn.Module) -> int:
    return sum(parameter.ndim > 1 for parameter in module.parameters())


def _units(layer_calls: list[str], layers: dict[str, tuple[str, str]]) -> Iterator[list[str]]:
    """Groups the layers that have run: those of the same number in several lists make one."""
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
    """Follows one forward pass of a model whose tensors are on the meta device.

    Args:
        inputs: on the meta device; ids by default.
        training: whether it is followed as in training, or as in evaluation.

    Raises:
        PlanError: if the model cannot be followed, has no layers that run one after the other, or runs one twice.
    """
    kind = model.config.model_type
    if kind in UNSPLITTABLE:
        raise PlanError(Problem("parallel.pipeline", f"{kind} {UNSPLITTABLE[kind]}", "Set parallel.pipeline to 1"))
    layers = _layers(model)
    follower = _Follower(model, set(layers))
    handles = []
    for name, module in model.named_modules():
        handles += _listen(follower, name, module)
    given: dict[str, Any] = dict(inputs or example_ids(model, BATCH, LENGTH))
    if "use_cache" in inspect.signature(model.forward).parameters:
        given["use_cache"] = False
    try:
        with traceable(model), torch.no_grad(), follower:
            output = model.train(training)(**given)
            follower.ends(output)
    except Exception as error:  # whatever an operation without values raises
        first = first_line(error)
        raise PlanError(
            Problem("parallel.pipeline", f"{kind} cannot be followed without computing it: {first}",
                    "Set parallel.pipeline to 1")
        ) from None  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()
    twice = [name for name, count in Counter(follower.layer_calls).items() if count > 1]
    units = [tuple(unit) for unit in _units(follower.layer_calls, layers)]
    if twice or len(units) < 2:
        reason = f"{kind} runs {twice[0]} several times" if twice else f"{kind} has no list of layers that run in a row"
        raise PlanError(Problem("parallel.pipeline", reason, "Set parallel.pipeline to 1"))
    numbers = [number for number, unit in enumerate(units) for _ in unit]
    return Dataflow(
        units, follower.calls, follower.structures, dict(follower.inner_flops), numbers, follower.reads, follower.uses,
        follower.unknown,
    )  # fmt: skip


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


def _listen(follower: _Follower, name: str, module: nn.Module) -> list[Any]:
    def enters(module: nn.Module, args: Any) -> None:
        follower.enters(name, module)

    def returns(module: nn.Module, args: Any, output: Any) -> None:
        follower.returns(name, module, output, heard=len(module._forward_hooks) > 1)

    return [module.register_forward_pre_hook(enters), module.register_forward_hook(returns)]
