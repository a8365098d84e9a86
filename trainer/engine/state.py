"""The training state of an engine of DeepSpeed, as chunks of full tensors under their Hugging Face names."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import Tensor, nn

from trainer.checkpoint_format import BUFFER, WEIGHT, TensorChunk
from trainer.compat.deepspeed.counters import read_counters, read_loss_scale, restore_counters, restore_loss_scale
from trainer.compat.deepspeed.fragments import FlatFragment
from trainer.compat.deepspeed.interfaces import DeepSpeedEngine
from trainer.compat.deepspeed.layouts.find import layout_of
from trainer.compat.deepspeed.zero3 import full_shape, is_partitioned, local_elements
from trainer.distributed import World
from trainer.engine.interface import Scalars, ScalarState
from trainer.engine.ownership import is_counted
from trainer.pipeline import local_parameters
from trainer.sharding import Shard, chunks_of_fragment, chunks_of_shard
from trainer.tensor_parallel import Mapper
from trainer.topology import GRADIENT_AXES


class DeepSpeedTrainingState:
    """See `TrainingState`."""

    def __init__(self, engine: DeepSpeedEngine, world: World, models: list[nn.Module], mapper: Mapper) -> None:
        """Find the optimizer's layout.

        Args:
            engine: DeepSpeed's engine.
            world: the world of this rank.
            models: Hugging Face models of this rank's stages.
            mapper: of the first of them.
        """
        self._engine, self._world, self._models, self._mapper = engine, world, models, mapper
        self._layout = layout_of(engine.optimizer)

    # Tensors ----------------------------------------------------------------------------------------------------------

    def owned_chunks(self) -> Iterator[TensorChunk]:
        """See `TrainingState.owned_chunks`."""
        topology = self._world.topology
        rank, ranks = topology.coordinate(*GRADIENT_AXES), topology.size(*GRADIENT_AXES)
        for parameter, shard in self._parameters():
            if not is_counted(parameter):
                continue
            for role, elements, offset in self._flat_state(parameter, owned_only=True):
                start, end = 0, elements.numel()
                if self._is_replicated(parameter):  # each rank saves its share of the elements
                    start, end = (end * (rank + side) // ranks for side in (0, 1))
                yield from _chunks(shard, role, elements[start:end], offset + start)
            if rank == 0:
                yield from self._factored_chunks(parameter, shard.name)
        if rank == topology.pipeline_rank == 0:
            yield from self._buffer_chunks(owned_only=True)

    def local_chunks(self) -> Iterator[TensorChunk]:
        """See `TrainingState.local_chunks`."""
        for parameter, shard in self._parameters():
            for role, elements, offset in self._flat_state(parameter, owned_only=False):
                yield from _chunks(shard, role, elements, offset)
            yield from self._factored_chunks(parameter, shard.name)
        yield from self._buffer_chunks(owned_only=False)

    def _parameters(self) -> Iterator[tuple[nn.Parameter, Shard]]:
        """Yield the parameters whose values this rank holds, with their shard records."""
        for name, pieces in local_parameters(self._models).items():
            for parameter, record in pieces:
                shard = record or Shard.full(name, full_shape(parameter))
                if shard.owner or not shard.owner_only:
                    yield parameter, shard

    def _fragment(self, parameter: nn.Parameter) -> FlatFragment | None:
        return self._layout.fragment(parameter) if parameter.requires_grad else None

    def _is_replicated(self, parameter: nn.Parameter) -> bool:
        """Return whether all ranks of `GRADIENT_AXES` hold the same elements."""
        return self._layout.is_replicated if parameter.requires_grad else not is_partitioned(parameter)

    def _flat_state(self, parameter: nn.Parameter, *, owned_only: bool) -> Iterator[tuple[str, Tensor, int]]:
        """Yield role, flat view and its offset in the flattened parameter, of the weight and its optimizer state."""
        if not parameter.requires_grad:
            yield WEIGHT, *local_elements(parameter)
            return
        fragment = self._layout.fragment(parameter)
        if fragment is None:
            return
        yield WEIGHT, self._layout.master_weights(fragment), fragment.parameter_offset
        yield from self._layout.state_fragments(parameter, owned_only=owned_only)

    def _factored_chunks(self, parameter: nn.Parameter, name: str) -> Iterator[TensorChunk]:
        """Yield state whose shape differs from the parameter's: rows and columns of Adafactor, full on every rank."""
        fragment = self._fragment(parameter)
        if fragment is None or not self._layout.is_replicated:
            return
        for role, value in self._optimizer_state(fragment).items():
            if isinstance(value, Tensor) and value.ndim and value.shape != fragment.optimizer_tensor.shape:
                yield TensorChunk(name, role, tuple(value.shape), (0,) * value.ndim, value)

    def _buffer_chunks(self, *, owned_only: bool) -> Iterator[TensorChunk]:
        """Yield persistent buffers; of the first model only if `owned_only`, because every stage has all buffers."""
        for model in self._models[: 1 if owned_only else None]:
            persistent = model.state_dict(keep_vars=True)
            for name, buffer in model.named_buffers():
                if name not in persistent:
                    continue
                for shard, part in self._mapper.buffer_shards(name, buffer):
                    if shard.owner or not owned_only:
                        for start, view in chunks_of_shard(part, shard):
                            yield TensorChunk(name, BUFFER, shard.full_shape, start, view)

    # Scalars ----------------------------------------------------------------------------------------------------------

    def scalar_state(self) -> ScalarState:
        """See `TrainingState.scalar_state`."""
        scalars = {
            shard.name: values
            for parameter, shard in self._parameters()
            if (values := self._optimizer_scalars(parameter))
        }
        if self._layout.counts_steps_per_group:
            steps = max((values["step"] for values in scalars.values()), default=0.0)
            scalars = {name: values | {"step": steps} for name, values in scalars.items()}
        return ScalarState(read_counters(self._engine), read_loss_scale(self._engine), scalars)

    def _optimizer_state(self, fragment: FlatFragment) -> dict[str, object]:
        state: dict[str, object] = self._layout.torch_optimizer.state.get(fragment.optimizer_tensor, {})
        return state

    def _optimizer_scalars(self, parameter: nn.Parameter) -> Scalars:
        fragment = self._fragment(parameter)
        scalars: Scalars = {}
        for key, value in ({} if fragment is None else self._optimizer_state(fragment)).items():
            if isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0):
                scalars[key] = float(value)
        return scalars

    # Loading ----------------------------------------------------------------------------------------------------------

    def allocate_optimizer_state(self) -> None:
        """See `TrainingState.allocate_optimizer_state`.

        An optimizer of torch creates its state in its first step. A checkpoint is loaded before that, into views of the
        state (`local_chunks`), which therefore must exist.
        """
        self._layout.allocate_optimizer_state()

    def drop_optimizer_state(self, names: Collection[str]) -> None:
        """See `TrainingState.drop_optimizer_state`."""
        for parameter, shard in self._parameters():
            fragment = self._fragment(parameter)
            if shard.name in names and fragment is not None and fragment.optimizer_tensor is parameter:
                self._layout.torch_optimizer.state.pop(fragment.optimizer_tensor, None)

    def load_scalar_state(self, scalar_state: ScalarState) -> None:
        """See `TrainingState.load_scalar_state`. Collective: all ranks must call it."""
        common: Mapping[str, float] = scalar_state.scalars.get("", {})
        for parameter, shard in self._parameters():
            fragment = self._fragment(parameter)
            if fragment is None or fragment.optimizer_tensor not in self._layout.torch_optimizer.state:
                continue
            has_own_state = fragment.optimizer_tensor.numel() == fragment.length
            values = scalar_state.scalars.get(shard.name, common) if has_own_state else common
            _set_scalars(self._optimizer_state(fragment), values)
        self._layout.restore_bias_correction(int(common.get("step", 0)))
        restore_counters(self._engine, scalar_state.counters)
        restore_loss_scale(self._engine, scalar_state.scaler)
        self.sync_model_weights()

    def sync_model_weights(self) -> None:
        """See `TrainingState.sync_model_weights`. Collective: all ranks must call it."""
        self._layout.sync_model_weights()


def _chunks(shard: Shard, role: str, elements: Tensor, offset: int) -> Iterator[TensorChunk]:
    """Split contiguous elements of a flattened shard into n-dimensional chunks."""
    for start, view in chunks_of_fragment(elements, offset, shard):
        yield TensorChunk(shard.name, role, shard.full_shape, start, view)


def _set_scalars(state: dict[str, object], values: Mapping[str, float]) -> None:
    """Set the existing values of the optimizer's state, in their types."""
    for key, value in values.items():
        previous = state.get(key)
        if isinstance(previous, Tensor):
            previous.fill_(value)
        elif isinstance(previous, int | float):
            state[key] = type(previous)(value)


def merge_scalars(all_scalars: Sequence[Mapping[str, Scalars]]) -> dict[str, Scalars]:
    """Merge the optimizer scalars of all ranks.

    Returns:
        Under "" the scalars of the parameter with the most steps, and by name those that differ from them.
    """
    by_name: dict[str, Scalars] = {}
    for scalars in all_scalars:
        by_name.update(scalars)
    common = max(by_name.values(), key=lambda values: values.get("step", 0.0), default={})
    return {"": common} | {name: values for name, values in by_name.items() if values != common}
