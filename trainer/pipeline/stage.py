"""One stage of a model: the Hugging Face model itself, of which only this stage's layers compute.

The forward pass is the family's own code, from masks and positions to the head. Layers of earlier stages are stubs that
return the received activations. Where the first layer of the next stage would run, the pass ends, and the values that
later stages read are sent. Which values these are follows from the traced dataflow, not from the family: usually the
hidden state; with it the router logits of a mixture, which the family's load-balancing loss reads on the last stage, an
encoder's output, a position bias, or an embedding that later layers use again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from math import prod
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.compat.torch.dispatch import pytree
from trainer.pipeline.dataflow import BATCH, LENGTH, Dataflow, ModuleCall, TensorSpec, TracedValue
from trainer.sharding import make_remote, wildcard_name

T = TypeVar("T")

BoundaryTensors = tuple[Tensor, ...]
"""Tensors that cross a boundary: `Dataflow.boundary_values`, those of one type stacked."""

_Output = tuple[str, int]
"""Module, and number of its earlier calls."""

_Leaves = Mapping[int, TracedValue]
"""Values among the leaves of a module's output, by index."""


class _EndOfStage(Exception):
    """The first layer of the next stage was reached."""


class Stage:
    """Turns a model into one of its stages.

    1. `drop_remote_parameters` removes the parameters of other stages, while all are on the meta device.
    2. `install` replaces the forward passes of other stages' modules, once the local ones are final.
    3. `run` computes one micro-batch.
    """

    def __init__(self, model: PreTrainedModel, dataflow: Dataflow, bounds: Sequence[int], number: int) -> None:
        """Make stage `number`, with the units of `dataflow` from bounds[number] up to bounds[number + 1].

        Raises:
            PlanError: if a value that cannot be sent crosses one of its boundaries.
        """
        self._model, self._dataflow, self._bounds, self.number = model, dataflow, tuple(bounds), number
        self._first, self._end = bounds[number], bounds[number + 1]
        self.is_first, self.is_last = number == 0, number == len(bounds) - 2
        self.incoming = [] if self.is_first else _in_sending_order(dataflow, self._first)
        self.outgoing = [] if self.is_last else _in_sending_order(dataflow, self._end)
        self._received: dict[TracedValue, Tensor] = {}
        self._computed: dict[TracedValue, Tensor] = {}
        self._counts: Counter[str] = Counter()
        self._is_running = False

    def drop_remote_parameters(self) -> dict[str, tuple[int, ...]]:
        """Replace the parameters of other stages by placeholders. Returns `parameter_stages`."""
        stages = parameter_stages(self._model, self._dataflow, self._bounds)
        remote = {
            id(parameter) for name, parameter in self._model.named_parameters() if self.number not in stages[name]
        }
        for module in self._model.modules():
            for key, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if id(parameter) in remote:
                    make_remote(module, key)
        return stages

    def install(self) -> None:
        """Replace the forward passes of other stages' modules, and capture the outputs that are sent.

        Four kinds of modules change. Layers of earlier stages return received values. Modules outside layers whose
        outputs are received return those. The first module of the next stage ends the pass. Modules of this stage
        whose outputs are sent keep computing; hooks capture the outputs.
        """
        calls = self._dataflow.calls
        received: dict[_Output, dict[int, TracedValue]] = defaultdict(dict)
        for value in self.incoming:
            received[value.module, value.occurrence][value.leaf] = value
        for call in calls:
            if call.position.is_inside and self._dataflow.unit(call.position) < self._first:
                self._replace_layer(call, received)
        outside_layers = {calls[v.call].module for v in self.incoming if not calls[v.call].position.is_inside}
        for name in outside_layers:
            self._replay(name, received)
        if not self.is_last:
            self._model.get_submodule(self._dataflow.units[self._end][0]).forward = _end_stage
        sent: dict[str, list[TracedValue]] = defaultdict(list)
        for value in self.outgoing:
            if self._dataflow.unit(calls[value.call].position) >= self._first:
                sent[value.module].append(value)
        for name, values in sent.items():
            self._capture(name, values)

    def _replace_layer(self, call: ModuleCall, received: Mapping[_Output, _Leaves]) -> None:
        """Make a layer of an earlier stage a stub that returns the received values of its output.

        Values of modules inside the layer are returned by calling these modules as stubs, because recorders of Hugging
        Face (of router logits, for one) collect them by hooks.
        """
        layer = self._model.get_submodule(call.module)
        if hasattr(layer, "gradient_checkpointing"):
            layer.gradient_checkpointing = False  # type: ignore[assignment]
        inner_values = [v for v in self.incoming if v.call == call.number and v.module != call.module]
        inner_outputs = dict.fromkeys((value.module, value.occurrence) for value in inner_values)

        def forward(*args: object, **kwargs: object) -> object:
            for name, occurrence in inner_outputs:
                inner = self._model.get_submodule(name)
                structure, leaves = self._dataflow.structures[name, occurrence]
                inner.forward = partial(self._output, structure, leaves, received[name, occurrence])
                inner()
            return self._output(call.output, call.leaves, received.get((call.module, call.occurrence), {}))

        layer.forward = forward

    def _replay(self, name: str, received: Mapping[_Output, _Leaves]) -> None:
        """Make a module outside layers return received values in the calls whose outputs were received."""
        module = self._model.get_submodule(name)
        compute = module.forward
        calls = {call.occurrence: call for call in self._dataflow.calls if call.module == name}

        def forward(*args: object, **kwargs: object) -> object:
            occurrence = self._counts[name]
            self._counts[name] += 1
            if (name, occurrence) not in received:
                return compute(*args, **kwargs)
            call = calls[occurrence]
            return self._output(call.output, call.leaves, received[name, occurrence])

        module.forward = forward

    def _output(
        self,
        structure: object,
        specs: tuple[TensorSpec | None, ...],
        received: _Leaves,
        *_: object,
        **__: object,
    ) -> object:
        """Build an output of this structure from received values.

        Unused leaves are filled with any received tensor of their shape, because the family's code may still access
        them.
        """
        same_shape: dict[TensorSpec | None, Tensor] = {
            self._dataflow.spec_of(value): tensor for value, tensor in self._received.items()
        }
        leaves = [
            self._received[received[n]] if n in received else same_shape.get(spec) for n, spec in enumerate(specs)
        ]
        output: object = pytree.tree_unflatten(leaves, structure)  # type: ignore[arg-type]
        return output

    def _capture(self, name: str, values: list[TracedValue]) -> None:
        """Capture values in the outputs of a module, for sending."""

        def keep(module: nn.Module, args: object, output: object) -> None:
            if not self._is_running:  # recomputed in the backward pass
                return
            occurrence = self._counts[f"{name}()"]
            self._counts[f"{name}()"] += 1
            leaves = pytree.tree_leaves(output) if any(value.occurrence == occurrence for value in values) else []
            self._computed.update({value: leaves[value.leaf] for value in values if value.occurrence == occurrence})

        self._model.get_submodule(name).register_forward_hook(keep)

    def run(self, compute: Callable[[], T], received: BoundaryTensors = ()) -> T | BoundaryTensors:
        """Compute one micro-batch.

        Args:
            compute: calls the model with the full micro-batch, as on one device.
            received: boundary tensors from the previous stage; empty on the first stage.

        Returns:
            The result of `compute` on the last stage; elsewhere the tensors to send to the next stage, of the shapes of
            `outgoing`.
        """
        self._counts.clear()
        self._received = dict(_unpack(self.incoming, received))
        self._computed = {value: tensor for value, tensor in self._received.items() if value in self.outgoing}
        self._is_running = True
        try:
            result = compute()
        except _EndOfStage:
            return tuple(_differentiable(tensor.contiguous()) for tensor in _pack(self.outgoing, self._computed))
        finally:
            self._is_running = False
            self._received, self._computed = {}, {}
        assert self.is_last, f"{self._dataflow.units[self._end][0]} was not reached"
        return result


def boundary_numel(dataflow: Dataflow, cut: int, batch: int, length: int, *, sequence_ranks: int = 1) -> dict[str, int]:
    """Return how many elements a rank sends across the boundary before unit `cut`, by the module that returns them.

    Args:
        dataflow: of the model.
        cut: first unit of the next stage.
        batch: samples of a micro-batch.
        length: tokens of each sample.
        sequence_ranks: ranks that share the activations between layers (sequence parallelism).
    """
    sizes = {BATCH: batch, LENGTH: length, BATCH * LENGTH: batch * length}
    layers = {name for unit in dataflow.units for name in unit}
    sent: dict[str, int] = defaultdict(int)
    for value in dataflow.boundary_values(cut):
        shared_by = sequence_ranks if value.module in layers else 1
        numel = prod(sizes.get(size, size) for size in dataflow.spec_of(value).shape)
        sent[wildcard_name(value.module)] += numel // shared_by
    return dict(sent)


def parameter_stages(model: nn.Module, dataflow: Dataflow, bounds: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return the stages that hold each parameter, by its first name; several where several use it (tied embeddings).

    A parameter that the forward pass does not use, such as that of an expert without tokens, belongs to its layer;
    outside layers it belongs to the first stage.
    """
    units = {name: number for number, unit in enumerate(dataflow.units) for name in unit}
    stages = {}
    for name, _ in model.named_parameters():
        path = name.split(".")
        containing_units = (units[prefix] for n in range(1, len(path)) if (prefix := ".".join(path[:n])) in units)
        used = dataflow.units_using(name) or set(containing_units) or {0}
        stages[name] = tuple(sorted({bisect_right(bounds, unit) - 1 for unit in used}))
    return stages


def _end_stage(*args: object, **kwargs: object) -> object:
    raise _EndOfStage


def _in_sending_order(dataflow: Dataflow, cut: int) -> list[TracedValue]:
    """Sort boundary values: integers last, because DeepSpeed counts gradients over the others by buffer index."""
    return sorted(
        dataflow.boundary_values(cut), key=lambda value: (not dataflow.spec_of(value).is_floating, _kind(value))
    )


def _kind(value: TracedValue) -> tuple[str, int]:
    """Return the key that values stacked in one tensor share, such as that of all layers' router logits."""
    return wildcard_name(value.module), value.leaf


def _groups(values: Sequence[TracedValue]) -> Iterator[list[TracedValue]]:
    for _, group in groupby(values, _kind):
        yield list(group)


def _pack(values: Sequence[TracedValue], tensors: dict[TracedValue, Tensor]) -> Iterator[Tensor]:
    for group in _groups(values):
        yield tensors[group[0]] if len(group) == 1 else torch.stack([tensors[value] for value in group])


def _unpack(values: Sequence[TracedValue], tensors: BoundaryTensors) -> Iterator[tuple[TracedValue, Tensor]]:
    for group, tensor in zip(_groups(values), tensors, strict=True):
        yield from zip(group, [tensor] if len(group) == 1 else tensor.unbind(), strict=True)


def _differentiable(tensor: Tensor) -> Tensor:
    """Make a sent tensor require a gradient, also after frozen weights: the next stage sends one for each tensor."""
    if torch.is_grad_enabled() and tensor.is_floating_point() and not tensor.requires_grad:
        return tensor.detach().requires_grad_()
    return tensor
