"""One stage of a model: the Hugging Face model itself, which computes with its own layers only.

Its forward pass is the family's own, from masks and positions to the head. Layers of earlier stages do not compute:
they return what has been received in their place. Where the first layer of a later stage would run, the pass ends, and
the values that later stages read are what is sent. Which values these are is known from following the model
(`trace.Flow`), not from its family: the hidden state as a rule, with it a mixture's router logits, which the family's
own load-balancing loss reads on the last stage, an encoder's output, a position bias, or an embedding that layers use
again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.compat.torch.dispatch import pytree
from trainer.pipeline.dataflow import BATCH, LENGTH, Dataflow, ModuleCall, TensorSpec, TracedValue
from trainer.sharding import make_remote, wildcard_name

T = TypeVar("T")

BoundaryTensors = tuple[Tensor, ...]
"""What crosses a boundary: the values of `Flow.crossing`, those of one kind (of every layer, say) stacked."""


class _EndOfStage(Exception):
    """The first layer of the next stage was reached."""


class Stage:
    """Makes a model one stage of itself.

    1. `drop_remote_parameters` takes away the weights of other stages, while all are on the meta device.
    2. `install` changes what the modules of other stages compute, once the own ones are complete.
    3. `run` computes one micro-batch.
    """

    def __init__(self, model: PreTrainedModel, dataflow: Dataflow, bounds: Sequence[int], number: int) -> None:
        """Stage `number` has the units from bounds[number] up to bounds[number + 1] of `dataflow`.

        Raises:
            PlanError: if a value crosses one of its boundaries that cannot be sent.
        """
        self._model, self._dataflow, self._bounds, self.number = model, dataflow, tuple(bounds), number
        self._first, self._end = bounds[number], bounds[number + 1]
        self.is_first, self.is_last = number == 0, number == len(bounds) - 2
        self.incoming = [] if self.is_first else _in_order(dataflow, self._first)
        self.outgoing = [] if self.is_last else _in_order(dataflow, self._end)
        self._received: dict[TracedValue, Tensor] = {}
        self._made: dict[TracedValue, Tensor] = {}
        self._counts: Counter[str] = Counter()
        self._runs = False

    def drop_remote_parameters(self) -> dict[str, tuple[int, ...]]:
        """Puts the weights of other stages elsewhere. Returns `parameter_stages`."""
        stages = parameter_stages(self._model, self._dataflow, self._bounds)
        foreign = {
            id(parameter) for name, parameter in self._model.named_parameters() if self.number not in stages[name]
        }
        for module in self._model.modules():
            for key, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if id(parameter) in foreign:
                    make_remote(module, key)
        return stages

    def install(self) -> None:
        """Replaces what modules of other stages compute, and listens to those whose outputs are sent."""
        calls = self._dataflow.calls
        given: dict[tuple[str, int], dict[int, TracedValue]] = defaultdict(dict)
        for value in self.incoming:
            given[value.module, value.occurrence][value.leaf] = value
        for call in calls:
            if call.position.is_inside and self._dataflow.unit(call.position) < self._first:
                self._replace_layer(call, given)
        beside = {calls[v.call].module for v in self.incoming if not calls[v.call].position.is_inside}
        for name in beside:
            self._replay_beside(name, given)
        if not self.is_last:
            self._model.get_submodule(self._dataflow.units[self._end][0]).forward = _stop
        made_here: dict[str, list[TracedValue]] = defaultdict(list)
        for value in self.outgoing:
            if self._dataflow.unit(calls[value.call].position) >= self._first:
                made_here[value.module].append(value)
        for name, values in made_here.items():
            self._listen(name, values)

    def _replace_layer(self, call: ModuleCall, given: dict[tuple[str, int], dict[int, TracedValue]]) -> None:
        """A layer of an earlier stage: calls what it has to give from inside, and returns what is read of it."""
        layer = self._model.get_submodule(call.module)
        if hasattr(layer, "gradient_checkpointing"):
            layer.gradient_checkpointing = False  # type: ignore[assignment]
        own = [value for value in self.incoming if value.call == call.number and value.module != call.module]
        heard = dict.fromkeys((value.module, value.occurrence) for value in own)

        def forward(*args: Any, **kwargs: Any) -> Any:
            for name, occurrence in heard:  # Hugging Face's recorders listen to them
                inner = self._model.get_submodule(name)
                inner.forward = partial(
                    self._give, *self._dataflow.structures[name, occurrence], given[name, occurrence]
                )
                inner()
            return self._give(call.output, call.leaves, given.get((call.module, call.occurrence), {}))

        layer.forward = forward

    def _replay_beside(self, name: str, given: dict[tuple[str, int], dict[int, TracedValue]]) -> None:
        """A module beside the layers: returns what was received in the calls whose outputs were, else computes."""
        module = self._model.get_submodule(name)
        computes = module.forward
        calls = {call.occurrence: call for call in self._dataflow.calls if call.module == name}

        def forward(*args: Any, **kwargs: Any) -> Any:
            occurrence = self._counts[name]
            self._counts[name] += 1
            if (name, occurrence) not in given:
                return computes(*args, **kwargs)
            return self._give(calls[occurrence].output, calls[occurrence].leaves, given[name, occurrence])

        module.forward = forward

    def _give(
        self, structure: Any, leaves: tuple[TensorSpec | None, ...], given: dict[int, TracedValue], *_: Any, **__: Any
    ) -> Any:
        """An output of this structure: what was received; where nobody reads, something of that shape."""
        alike: dict[TensorSpec | None, Tensor] = {
            self._dataflow.spec_of(value): tensor for value, tensor in self._received.items()
        }
        return pytree.tree_unflatten(
            [self._received[given[n]] if n in given else alike.get(leaf) for n, leaf in enumerate(leaves)], structure
        )

    def _listen(self, name: str, values: list[TracedValue]) -> None:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if not self._runs:  # computed again in the backward pass
                return
            occurrence = self._counts[f"{name}()"]
            self._counts[f"{name}()"] += 1
            leaves = pytree.tree_leaves(output) if any(value.occurrence == occurrence for value in values) else []
            self._made.update({value: leaves[value.leaf] for value in values if value.occurrence == occurrence})

        self._model.get_submodule(name).register_forward_hook(keep)

    def run(self, compute: Callable[[], T], received: BoundaryTensors = ()) -> T | BoundaryTensors:
        """Computes one micro-batch.

        Args:
            compute: calls the model with the whole micro-batch, as on one device.
            received: what the stage before has returned; nothing on the first.

        Returns:
            On the last stage what `compute` returns; on the others, what the next one has to receive.
        """
        self._counts.clear()
        self._received = dict(_unpack(self.incoming, received))
        self._made = {value: tensor for value, tensor in self._received.items() if value in self.outgoing}
        self._runs = True
        try:
            result = compute()
        except _EndOfStage:
            return tuple(_differentiable(tensor.contiguous()) for tensor in _pack(self.outgoing, self._made))
        finally:
            self._runs = False
            self._received, self._made = {}, {}
        assert self.is_last, f"{self._dataflow.units[self._end][0]} was not reached"
        return result


def boundary_numel(dataflow: Dataflow, cut: int, batch: int, length: int, sequence_ranks: int = 1) -> dict[str, int]:
    """How many numbers a rank sends over the boundary before unit `cut`, by the modules that give them.

    Args:
        batch: samples of a micro-batch. length: tokens of each. sequence_ranks: ranks that share what lies between
            layers (sequence parallelism).
    """
    sizes = {BATCH: batch, LENGTH: length, BATCH * LENGTH: batch * length}
    layers = {name for unit in dataflow.units for name in unit}
    sent: dict[str, int] = defaultdict(int)
    for value in dataflow.boundary_values(cut):
        shared_by = sequence_ranks if value.module in layers else 1
        sent[wildcard_name(value.module)] += (
            prod(sizes.get(size, size) for size in dataflow.spec_of(value).shape) // shared_by
        )
    return dict(sent)


def parameter_stages(model: nn.Module, dataflow: Dataflow, bounds: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Stages that hold each parameter, by its first name; more than one where several use it (tied embeddings).

    A weight that the forward pass does not use, such as an expert's that no token chose, lies with the layer it is in,
    and outside all layers on the first stage.
    """
    units = {name: number for number, unit in enumerate(dataflow.units) for name in unit}
    found = {}
    for name, _ in model.named_parameters():
        path = name.split(".")
        containing_units = (units[prefix] for n in range(1, len(path)) if (prefix := ".".join(path[:n])) in units)
        used = dataflow.units_using(name) or set(containing_units) or {0}
        found[name] = tuple(sorted({bisect_right(bounds, unit) - 1 for unit in used}))
    return found


def _stop(*args: Any, **kwargs: Any) -> Any:
    raise _EndOfStage


def _in_order(dataflow: Dataflow, cut: int) -> list[TracedValue]:
    """What crosses, whole numbers last: DeepSpeed counts gradients over the others and shares buffers by number."""
    return sorted(
        dataflow.boundary_values(cut), key=lambda value: (not dataflow.spec_of(value).is_floating, _kind(value))
    )


def _kind(value: TracedValue) -> tuple[str, int]:
    """Values of one kind travel as one tensor: all layers' router logits."""
    return wildcard_name(value.module), value.leaf


def _groups(values: Sequence[TracedValue]) -> Iterator[list[TracedValue]]:
    for _, group in groupby(values, _kind):
        yield list(group)


def _pack(values: Sequence[TracedValue], tensors: dict[TracedValue, Tensor]) -> Iterator[Tensor]:
    for group in _groups(values):
        yield tensors[group[0]] if len(group) == 1 else torch.stack([tensors[value] for value in group])


def _unpack(values: Sequence[TracedValue], record: BoundaryTensors) -> Iterator[tuple[TracedValue, Tensor]]:
    for group, tensor in zip(_groups(values), record, strict=True):
        yield from zip(group, [tensor] if len(group) == 1 else tensor.unbind(), strict=True)


def _differentiable(tensor: Tensor) -> Tensor:
    """A gradient is received for everything that is sent, also where no weight behind it is trained."""
    if torch.is_grad_enabled() and tensor.is_floating_point() and not tensor.requires_grad:
        return tensor.detach().requires_grad_()
    return tensor
