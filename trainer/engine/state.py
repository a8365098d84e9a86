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

from trainer.checkpoint_format import BUFFER, WEIGHT
from trainer.compat.deepspeed.optimizer_layouts import OptimizerLayout, layout_of
from trainer.distributed import World
from trainer.pipeline import local_parameters
from trainer.sharding import Shard, chunks_of_fragment, chunks_of_shard, is_owned
from trainer.tensor_parallel import Mapper

Scalars = dict[str, float]

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


@dataclass(frozen=True)
class TensorChunk:
    """A box of a whole tensor, where it lies on this rank."""

    name: str
    """Hugging Face name of the weight or buffer."""

    role: str
    shape: tuple[int, ...]
    """Of the whole tensor."""

    start: tuple[int, ...]
    """Where the box begins in it."""

    view: Tensor
    """Its elements, as a view of where training reads and writes them."""


@dataclass(frozen=True)
class ScalarState:
    """What is no tensor. Plain JSON."""

    counters: Mapping[str, int]
    """DeepSpeed's: steps, samples, and steps skipped for want of a finite gradient."""

    scaler: Mapping[str, float | bool]
    """State of fp16's loss scale; empty in other precisions."""

    scalars: Mapping[str, Scalars]
    """What the optimizer keeps beside tensors, such as `step`, by parameter; under "" what most have."""

    @classmethod
    def initial(cls) -> ScalarState:
        """Those of a run that has not begun."""
        return cls(dict.fromkeys(_COUNTERS, 0), {}, {})


class TrainingState:
    """Reads and writes the fp32 weights, the optimizer's state and all counters of an engine, between two steps."""

    def __init__(self, engine: Any, world: World, models: list[nn.Module], mapper: Mapper) -> None:
        """Args:
        models: of this rank's stages. mapper: of the first of them.
        """
        self._engine, self._world, self._models, self._mapper = engine, world, models, mapper
        self._layout: OptimizerLayout = layout_of(engine.optimizer)

    # Tensors ---------------------------------------------------------------------------------------------------------

    def owned_chunks(self) -> Iterator[TensorChunk]:
        """What this rank writes: over all ranks, every element of every tensor once."""
        topology = self._world.topology
        for parameter, shard in self._parameters():
            if not is_owned(parameter) or getattr(parameter, "ds_pipe_replicated", False):
                continue
            for role, part, parameter_offset in self._fragments(parameter, owned_only=True):
                low, high = 0, part.numel()
                replicated = (
                    self._layout.is_replicated if parameter.requires_grad else not hasattr(parameter, "ds_tensor")
                )
                if replicated:
                    low, high = (high * (topology.data_rank + side) // topology.data for side in (0, 1))
                yield from _chunks(shard, role, part[low:high], parameter_offset + low)
            if topology.data_rank == 0:
                yield from self._other_shape_chunks(parameter, shard.name)
        if topology.data_rank == topology.stage == 0:
            yield from self._buffer_chunks(owned_only=True)

    def local_chunks(self) -> Iterator[TensorChunk]:
        """All that this rank holds, whoever writes it. After `allocate_optimizer_state`."""
        for parameter, shard in self._parameters():
            for role, part, parameter_offset in self._fragments(parameter, owned_only=False):
                yield from _chunks(shard, role, part, parameter_offset)
            yield from self._other_shape_chunks(parameter, shard.name)
        yield from self._buffer_chunks(owned_only=False)

    def _parameters(self) -> Iterator[tuple[nn.Parameter, Shard]]:
        for name, pieces in local_parameters(self._models).items():
            for parameter, record in pieces:
                shard = record or Shard.full(name, getattr(parameter, "ds_shape", parameter.shape))
                if shard.owner or not shard.owner_only:
                    yield parameter, shard

    def _fragments(self, parameter: nn.Parameter, *, owned_only: bool) -> Iterator[tuple[str, Tensor, int]]:
        """(kind, elements, where they begin in the flattened parameter)."""
        if not parameter.requires_grad:
            yield WEIGHT, *self._frozen_weight(parameter)
            return
        fragment = self._layout.fragment(parameter)
        if fragment is not None:
            yield WEIGHT, self._layout.master_weights(fragment), fragment.parameter_offset
            yield from self._layout.state(parameter, owned_only=owned_only)

    @staticmethod
    def _frozen_weight(parameter: nn.Parameter) -> tuple[Tensor, int]:
        if not hasattr(parameter, "ds_tensor"):
            return parameter.detach().view(-1), 0
        part = parameter.ds_tensor.detach().view(-1)
        parameter_offset = torch.distributed.get_rank(parameter.ds_process_group) * part.numel()  # type: ignore[attr-defined]
        return part[: max(0, int(parameter.ds_numel) - parameter_offset)], parameter_offset  # type: ignore[attr-defined]

    def _other_shape_chunks(self, parameter: nn.Parameter, name: str) -> Iterator[TensorChunk]:
        """State of another shape than the parameter's, such as Adafactor's rows and columns: whole on every rank."""
        fragment = self._layout.fragment(parameter) if parameter.requires_grad else None
        if fragment is None or not self._layout.is_replicated:
            return
        for role, tensor in self._layout.torch_optimizer.state.get(fragment.optimizer_tensor, {}).items():
            if isinstance(tensor, Tensor) and tensor.ndim and tensor.shape != fragment.optimizer_tensor.shape:
                yield TensorChunk(name, role, tuple(tensor.shape), (0,) * tensor.ndim, tensor)

    def _buffer_chunks(self, *, owned_only: bool) -> Iterator[TensorChunk]:
        """Of the first of this rank's models alone if `owned_only`: every stage has all buffers."""
        for model in self._models[: 1 if owned_only else None]:
            persistent = model.state_dict(keep_vars=True)
            for name, buffer in model.named_buffers():
                if name not in persistent:
                    continue
                for shard, part in self._mapper.buffer_shards(name, buffer):
                    if shard.owner or not owned_only:
                        for start, view in chunks_of_shard(part, shard):
                            yield TensorChunk(name, BUFFER, shard.full_shape, start, view)

    # Numbers ---------------------------------------------------------------------------------------------------------

    def scalar_state(self) -> ScalarState:
        """This rank's; `scalars` are those of the parameters that it holds."""
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        kept = vars(scaler) if getattr(scaler, "dynamic", False) else {}
        scalars = {shard.name: values for p, shard in self._parameters() if (values := self._optimizer_scalars(p))}
        if isinstance(self._layout.adam, FusedAdam | FusedLion):
            # They count the steps of all parameters of a group at the last one alone.
            most = max((values["step"] for values in scalars.values()), default=0.0)
            scalars = {name: values | {"step": most} for name, values in scalars.items()}
        return ScalarState(
            {key: int(getattr(self._engine, key)) for key in _COUNTERS},
            {key: value for key, value in kept.items() if isinstance(value, int | float)},
            scalars,
        )

    def _optimizer_scalars(self, parameter: nn.Parameter) -> Scalars:
        fragment = self._layout.fragment(parameter) if parameter.requires_grad else None
        state = {} if fragment is None else self._layout.torch_optimizer.state.get(fragment.optimizer_tensor, {})
        return {
            key: float(value)
            for key, value in state.items()
            if isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0)
        }

    # Loading ---------------------------------------------------------------------------------------------------------

    def allocate_optimizer_state(self) -> None:
        """Makes the optimizer's state, where it is not there yet; the values of all tensors are then to be replaced."""
        self._layout.allocate_optimizer_state()

    def drop_optimizer_state(self, names: Collection[str]) -> None:
        """Drops the optimizer's state of parameters that have not been stepped yet, where each has its own."""
        for parameter, shard in self._parameters():
            fragment = self._layout.fragment(parameter) if parameter.requires_grad else None
            if shard.name in names and fragment is not None and fragment.optimizer_tensor is parameter:
                self._layout.torch_optimizer.state.pop(fragment.optimizer_tensor, None)

    def load_scalar_state(self, scalar_state: ScalarState) -> None:
        """After all tensors have been filled: takes the numbers, and lets the model compute with the weights."""
        torch_optimizer = self._layout.torch_optimizer
        for parameter, shard in self._parameters():
            fragment = self._layout.fragment(parameter) if parameter.requires_grad else None
            if fragment is None or fragment.optimizer_tensor not in torch_optimizer.state:
                continue
            whole = fragment.optimizer_tensor.numel() == fragment.length
            values = scalar_state.scalars.get(shard.name if whole else "", scalar_state.scalars.get("", {}))
            _set_scalars(torch_optimizer.state[fragment.optimizer_tensor], values)
        self._layout.restore_bias_correction(int(scalar_state.scalars.get("", {}).get("step", 0)))
        for key in _COUNTERS:
            setattr(self._engine, key, int(scalar_state.counters[key]))
        # By which DeepSpeed knows the last micro-batch of a step; a step may have had another number of them before.
        self._engine.micro_steps = self._engine.global_steps * self._engine.gradient_accumulation_steps()
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        if getattr(scaler, "dynamic", False):
            vars(scaler).update({key: value for key, value in scalar_state.scaler.items() if key in vars(scaler)})
        self._replay_schedule(scalar_state.counters["global_steps"] - scalar_state.counters["skipped_steps"])
        self._layout.sync_model_weights()

    def _replay_schedule(self, steps: int) -> None:
        """Learning rates are a function of the steps taken: the schedule walks through them once more, by its own
        rules, so that one that is longer now goes on as if it had always been."""
        if self._engine.lr_scheduler is None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch misses the optimizer's steps in between
            for _ in range(steps):
                self._engine.lr_scheduler.step()


def _chunks(shard: Shard, role: str, part: Tensor, parameter_offset: int) -> Iterator[TensorChunk]:
    for start, view in chunks_of_fragment(part, parameter_offset, shard):
        yield TensorChunk(shard.name, role, shard.full_shape, start, view)


def _set_scalars(state: dict[str, Any], values: Mapping[str, float]) -> None:
    for key, value in values.items():
        old = state.get(key)
        if isinstance(old, Tensor):
            old.fill_(value)
        elif old is not None:
            state[key] = type(old)(value)


def merge_scalars(all_scalars: list[Mapping[str, Scalars]]) -> dict[str, Scalars]:
    """What all ranks' optimizers keep beside tensors: under "" that of the parameter with the most steps, and by name
    what differs from it."""
    by_name: dict[str, Scalars] = {}
    for scalars in all_scalars:
        by_name.update(scalars)
    most = max(by_name.values(), key=lambda values: values.get("step", 0.0), default={})
    return {"": most} | {name: values for name, values in by_name.items() if values != most}
