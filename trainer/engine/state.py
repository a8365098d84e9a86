"""Everything that a checkpoint has to hold of an engine, as boxes of whole tensors under their Hugging Face names."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.ops.adam import FusedAdam
from deepspeed.ops.lion import FusedLion
from torch import Tensor, nn

from trainer.distributed import World
from trainer.engine.holding import Holding, holding_of
from trainer.pipeline import local_parameters
from trainer.sharding import Shard, boxes_of, counts, parts_in_whole
from trainer.store import BUFFER, WEIGHT
from trainer.tensor_parallel import Mapper

Scalars = dict[str, float]

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


@dataclass(frozen=True)
class Piece:
    """A box of a whole tensor, where it lies on this rank."""

    name: str
    """Hugging Face name of the weight or buffer."""

    kind: str
    shape: tuple[int, ...]
    """Of the whole tensor."""

    start: tuple[int, ...]
    """Where the box begins in it."""

    view: Tensor
    """Its elements, as a view of where training reads and writes them."""


@dataclass(frozen=True)
class Numbers:
    """What is no tensor. Plain JSON."""

    counters: Mapping[str, int]
    """DeepSpeed's: steps, samples, and steps skipped for want of a finite gradient."""

    scaler: Mapping[str, float | bool]
    """State of fp16's loss scale; empty in other precisions."""

    scalars: Mapping[str, Scalars]
    """What the optimizer keeps beside tensors, such as `step`, by parameter; under "" what most have."""

    @classmethod
    def at_first(cls) -> Numbers:
        """Those of a run that has not begun."""
        return cls(dict.fromkeys(_COUNTERS, 0), {}, {})


class TrainingState:
    """Reads and writes the fp32 weights, the optimizer's state and all counters of an engine, between two steps."""

    def __init__(self, engine: Any, world: World, models: list[nn.Module], mapper: Mapper) -> None:
        """Args:
        models: of this rank's stages. mapper: of the first of them.
        """
        self._engine, self._world, self._models, self._mapper = engine, world, models, mapper
        self._holding: Holding = holding_of(engine.optimizer)

    # Tensors ---------------------------------------------------------------------------------------------------------

    def owned(self) -> Iterator[Piece]:
        """What this rank writes: over all ranks, every element of every tensor once."""
        place = self._world.topology
        for parameter, shard in self._parameters():
            if not counts(parameter) or getattr(parameter, "ds_pipe_replicated", False):
                continue
            for kind, part, first in self._stretches(parameter, owned=True):
                low, high = 0, part.numel()
                replicated = (
                    self._holding.is_replicated if parameter.requires_grad else not hasattr(parameter, "ds_tensor")
                )
                if replicated:
                    low, high = (high * (place.data_rank + side) // place.data for side in (0, 1))
                yield from _pieces(shard, kind, part[low:high], first + low)
            if place.data_rank == 0:
                yield from self._shapeless(parameter, shard.name)
        if place.data_rank == place.stage == 0:
            yield from self._buffer_pieces(owned=True)

    def held(self) -> Iterator[Piece]:
        """All that this rank holds, whoever writes it. After `allocate`."""
        for parameter, shard in self._parameters():
            for kind, part, first in self._stretches(parameter, owned=False):
                yield from _pieces(shard, kind, part, first)
            yield from self._shapeless(parameter, shard.name)
        yield from self._buffer_pieces(owned=False)

    def _parameters(self) -> Iterator[tuple[nn.Parameter, Shard]]:
        for name, pieces in local_parameters(self._models).items():
            for parameter, record in pieces:
                shard = record or Shard.whole(name, getattr(parameter, "ds_shape", parameter.shape))
                if shard.owner or not shard.lone:
                    yield parameter, shard

    def _stretches(self, parameter: nn.Parameter, *, owned: bool) -> Iterator[tuple[str, Tensor, int]]:
        """(kind, elements, where they begin in the flattened parameter)."""
        if not parameter.requires_grad:
            yield WEIGHT, *self._frozen(parameter)
            return
        held = self._holding.held(parameter)
        if held is not None:
            yield WEIGHT, self._holding.weights(held), held.first
            yield from self._holding.state(parameter, owned=owned)

    @staticmethod
    def _frozen(parameter: nn.Parameter) -> tuple[Tensor, int]:
        if not hasattr(parameter, "ds_tensor"):
            return parameter.detach().view(-1), 0
        part = parameter.ds_tensor.detach().view(-1)
        first = torch.distributed.get_rank(parameter.ds_process_group) * part.numel()  # type: ignore[attr-defined]
        return part[: max(0, int(parameter.ds_numel) - first)], first  # type: ignore[attr-defined]

    def _shapeless(self, parameter: nn.Parameter, name: str) -> Iterator[Piece]:
        """State of another shape than the parameter's, such as Adafactor's rows and columns: whole on every rank."""
        held = self._holding.held(parameter) if parameter.requires_grad else None
        if held is None or not self._holding.is_replicated:
            return
        for kind, tensor in self._holding.inner.state.get(held.stepped, {}).items():
            if isinstance(tensor, Tensor) and tensor.ndim and tensor.shape != held.stepped.shape:
                yield Piece(name, kind, tuple(tensor.shape), (0,) * tensor.ndim, tensor)

    def _buffer_pieces(self, *, owned: bool) -> Iterator[Piece]:
        """Of the first of this rank's models alone if `owned`: every stage has all buffers."""
        for model in self._models[: 1 if owned else None]:
            persistent = model.state_dict(keep_vars=True)
            for name, buffer in model.named_buffers():
                if name not in persistent:
                    continue
                for shard, part in self._mapper.parts_of_buffer(name, buffer):
                    if shard.owner or not owned:
                        for start, view in parts_in_whole(part, shard):
                            yield Piece(name, BUFFER, shard.whole_shape, start, view)

    # Numbers ---------------------------------------------------------------------------------------------------------

    def numbers(self) -> Numbers:
        """This rank's; `scalars` are those of the parameters that it holds."""
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        kept = vars(scaler) if getattr(scaler, "dynamic", False) else {}
        scalars = {shard.name: found for p, shard in self._parameters() if (found := self._scalars(p))}
        if isinstance(self._holding.adam, FusedAdam | FusedLion):
            # They count the steps of all parameters of a group at the last one alone.
            most = max((values["step"] for values in scalars.values()), default=0.0)
            scalars = {name: values | {"step": most} for name, values in scalars.items()}
        return Numbers(
            {key: int(getattr(self._engine, key)) for key in _COUNTERS},
            {key: value for key, value in kept.items() if isinstance(value, int | float)},
            scalars,
        )

    def _scalars(self, parameter: nn.Parameter) -> Scalars:
        held = self._holding.held(parameter) if parameter.requires_grad else None
        state = {} if held is None else self._holding.inner.state.get(held.stepped, {})
        return {
            key: float(value)
            for key, value in state.items()
            if isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0)
        }

    # Loading ---------------------------------------------------------------------------------------------------------

    def allocate(self) -> None:
        """Makes the optimizer's state, where it is not there yet; the values of all tensors are then to be replaced."""
        self._holding.allocate()

    def forget(self, names: Collection[str]) -> None:
        """Drops the optimizer's state of parameters that have not been stepped yet, where each has its own."""
        for parameter, shard in self._parameters():
            held = self._holding.held(parameter) if parameter.requires_grad else None
            if shard.name in names and held is not None and held.stepped is parameter:
                self._holding.inner.state.pop(held.stepped, None)

    def complete(self, numbers: Numbers) -> None:
        """After all tensors have been filled: takes the numbers, and lets the model compute with the weights."""
        inner = self._holding.inner
        for parameter, shard in self._parameters():
            held = self._holding.held(parameter) if parameter.requires_grad else None
            if held is None or held.stepped not in inner.state:
                continue
            whole = held.stepped.numel() == held.length
            values = numbers.scalars.get(shard.name if whole else "", numbers.scalars.get("", {}))
            _set_scalars(inner.state[held.stepped], values)
        self._holding.recall_steps(int(numbers.scalars.get("", {}).get("step", 0)))
        for key in _COUNTERS:
            setattr(self._engine, key, int(numbers.counters[key]))
        # By which DeepSpeed knows the last micro-batch of a step; a step may have had another number of them before.
        self._engine.micro_steps = self._engine.global_steps * self._engine.gradient_accumulation_steps()
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        if getattr(scaler, "dynamic", False):
            vars(scaler).update({key: value for key, value in numbers.scaler.items() if key in vars(scaler)})
        self._replay_schedule(numbers.counters["global_steps"] - numbers.counters["skipped_steps"])
        self._holding.publish()

    def _replay_schedule(self, steps: int) -> None:
        """Learning rates are a function of the steps taken: the schedule walks through them once more, by its own
        rules, so that one that is longer now goes on as if it had always been."""
        if self._engine.lr_scheduler is None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch misses the optimizer's steps in between
            for _ in range(steps):
                self._engine.lr_scheduler.step()


def _pieces(shard: Shard, kind: str, part: Tensor, first: int) -> Iterator[Piece]:
    for start, view in boxes_of(part, first, shard):
        yield Piece(shard.name, kind, shard.whole_shape, start, view)


def _set_scalars(state: dict[str, Any], values: Mapping[str, float]) -> None:
    for key, value in values.items():
        old = state.get(key)
        if isinstance(old, Tensor):
            old.fill_(value)
        elif old is not None:
            state[key] = type(old)(value)


def merged(all_scalars: list[Mapping[str, Scalars]]) -> dict[str, Scalars]:
    """What all ranks' optimizers keep beside tensors: under "" that of the parameter with the most steps, and by name
    what differs from it."""
    by_name: dict[str, Scalars] = {}
    for scalars in all_scalars:
        by_name.update(scalars)
    most = max(by_name.values(), key=lambda values: values.get("step", 0.0), default={})
    return {"": most} | {name: values for name, values in by_name.items() if values != most}
