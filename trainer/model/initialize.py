"""Random weights: the family's own initialization, equal in every layout, one module at a time.

Each module is initialized with its full shapes, from a random stream seeded by (seed, module name), and its parameters
are yielded before the next module is materialized; the consumer shards or partitions them. So no rank ever holds the
full model, and the values do not depend on the number of ranks.
"""

from __future__ import annotations

import zlib
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.compat.torch.dispatch import DispatchMode, Operation, storage_id, written_tensors
from trainer.compat.transformers.initialization import (
    initialization_context,
    initialize_module,
    marked_as_initialized,
    zeroing_initializers,
)
from trainer.errors import ConfigError, Problem
from trainer.sharding import shard_of

Parameters = list[nn.Parameter]
"""Parameters that have received their final values together."""


def _seed_of(seed: int, name: str) -> int:
    return (seed * 0x9E3779B97F4A7C15 + zlib.crc32(name.encode())) % (1 << 63)


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


class _WriteRecorder(DispatchMode):
    """Records the storages that operations write to."""

    def __init__(self) -> None:
        self.storages: set[int] = set()

    def dispatch(self, func: Operation, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """See `DispatchMode.dispatch`."""
        self.storages.update(storage_id(tensor) for tensor in written_tensors(func, args, kwargs))
        return super().dispatch(func, args, kwargs)


class _Initializer:
    """Walks a model on the meta device, children before parents, and sets every tensor."""

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        self._model, self._seed = model, seed
        self._materialized: dict[nn.Parameter, nn.Parameter] = {}
        """From a meta parameter to the real one, for weights that several modules share."""

        self._last_writer: dict[nn.Parameter, nn.Module] = {}
        """From a meta parameter to the last module above its own that sets it; see `_survey`."""

        self._pending: dict[nn.Parameter, str] = {}
        """Real parameters that such a module has yet to set, with their names."""

        self._remote: dict[nn.Module, list[tuple[nn.Module, str]]] = defaultdict(list)
        """By such a module, the parameters that it sets and that other stages hold: (module, key)."""

        self._constructed: PreTrainedModel | None = None

    def run(self, module: nn.Module, name: str) -> Iterator[Parameters]:
        """Initialize `module`, which the model calls `name`, and all modules below it."""
        with zeroing_initializers():
            self._survey(module, self._model)
        yield from self.walk(module, name, self._model, in_block=False)

    def _survey(self, module: nn.Module, owner: PreTrainedModel) -> None:
        """Find the modules outside blocks that set weights of modules below them, as T5's model sets its embedding.

        Runs their rules while all tensors are on the meta device. A weight is yielded only after the last of them.
        """
        owner = module if isinstance(module, PreTrainedModel) else owner
        children = [] if isinstance(module, nn.ModuleList) else list(module.children())
        for child in children:
            self._survey(child, owner)
        if not children:
            return
        with _WriteRecorder() as recorder:
            try:
                initialize_module(owner, module)
                written = recorder.storages
            except Exception:  # a rule that reads values cannot run on the meta device, and may set anything
                written = None
        for inner in module.modules():
            if inner is module:
                continue
            for key, parameter in (*_local_parameters(inner), *vars(inner).items()):
                if not isinstance(parameter, nn.Parameter) or not parameter.is_meta:
                    continue
                if written is None or storage_id(parameter) in written:
                    self._last_writer[parameter] = module
                    if key in vars(inner):
                        self._remote[module].append((inner, key))

    def walk(self, module: nn.Module, name: str, owner: PreTrainedModel, *, in_block: bool) -> Iterator[Parameters]:
        """Initialize `module` and all modules below it.

        Args:
            module: whose tensors are on the meta device.
            name: of the module in the model.
            owner: the nearest model above, which knows the family's rules.
            in_block: whether the module lies inside a block. A family may set a block's inner weights when it
                initializes the block itself (GPT-2 scales its residual projections so), but never across blocks.
                Therefore a block is yielded at once, and what lies outside blocks module by module.
        """
        owner = module if isinstance(module, PreTrainedModel) else owner
        for key, child in module.named_children():
            is_block = not in_block and isinstance(module, nn.ModuleList)
            yield from self.walk(child, _join(name, key), owner, in_block=in_block or is_block)
            if is_block:
                yield self._finish([*child.named_parameters(), *child.named_buffers()], _join(name, key))
        shared = self._materialize(module, name)
        torch.manual_seed(_seed_of(self._seed, name))
        with marked_as_initialized(shared), self._with_remote_memory(module):
            initialize_module(owner, module)
        for meta in [meta for meta, writer in self._last_writer.items() if writer is module]:
            if meta in self._materialized:
                parameter = self._materialized[meta]
                yield self._finish([(self._pending.pop(parameter), parameter)], "")
        if not in_block:
            yield self._finish([*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)], name)

    @contextmanager
    def _with_remote_memory(self, module: nn.Module) -> Iterator[None]:
        """Give memory to the parameters of other stages that `module` sets.

        All stages then draw the same random numbers for the parameters that follow.
        """
        remote = [(inner, key, vars(inner)[key]) for inner, key in self._remote[module]]
        for inner, key, parameter in remote:
            vars(inner)[key] = nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False)
        yield
        for inner, key, parameter in remote:
            vars(inner)[key] = parameter

    def _materialize(self, module: nn.Module, name: str) -> Parameters:
        """Give the module's own tensors memory, filled with NaN; return the tensors that had memory before."""
        shared = []
        for key, parameter in _local_parameters(module):
            if parameter in self._materialized:
                shared.append(self._materialized[parameter])
            elif parameter.is_meta:
                real = _with_attributes_of(parameter, torch.full_like(parameter, torch.nan, device="cpu"))
                self._materialized[parameter] = real
                if parameter in self._last_writer:
                    self._pending[real] = _join(name, key)
            else:
                continue
            setattr(module, key, self._materialized[parameter])
        _materialize_buffers(module)
        return shared

    def _finish(self, tensors: Iterable[tuple[str, Tensor]], prefix: str) -> Parameters:
        """Return the parameters among tensors that have their final value.

        Tensors that the family's rules have not set get the value of the constructor.
        """
        final = [(key, tensor) for key, tensor in tensors if tensor not in self._pending]
        for key, tensor in final:
            if tensor.is_floating_point() and tensor.numel() and bool(tensor.isnan().any()):
                tensor.copy_(self._constructor_value(_join(prefix, key)))
        return [tensor for _, tensor in final if isinstance(tensor, nn.Parameter)]

    def _constructor_value(self, name: str) -> Tensor:
        """Return the value of a tensor that the family sets in its constructor, not in its initialization rules.

        Two families of transformers 5.23 need it (openai-gpt, falcon_h1): the full model is constructed once.
        """
        if self._constructed is None:
            torch.manual_seed(self._seed)
            self._constructed = type(self._model)(self._model.config)
        value = dict(self._constructed.named_parameters()) | dict(self._constructed.named_buffers())
        if value[name].is_floating_point() and bool(value[name].isnan().any()):
            raise ConfigError(
                Problem(
                    "model.initialize",
                    f"'{self._model.config.model_type}' gives no random value to {name}",
                    "Set model.initialize to 'pretrained'",
                )
            )
        return value[name]


class _BufferInitializer(_Initializer):
    """The same walk for buffers; parameters stay on the meta device."""

    def _materialize(self, module: nn.Module, name: str) -> Parameters:
        _materialize_buffers(module)
        return []

    def _finish(self, tensors: Iterable[tuple[str, Tensor]], prefix: str) -> Parameters:
        return super()._finish([(key, t) for key, t in tensors if not isinstance(t, nn.Parameter)], prefix)


def _local_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(recurse=False, remove_duplicate=False))


def _materialize_buffers(module: nn.Module) -> None:
    for key, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
        if buffer.is_meta:
            unset = torch.nan if buffer.is_floating_point() else 0
            setattr(module, key, torch.full_like(buffer, unset, device="cpu"))


def _with_attributes_of(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    real = nn.Parameter(value, parameter.requires_grad)
    vars(real).update(vars(parameter))
    return real


@torch.no_grad()
def random_weights(model: PreTrainedModel, seed: int) -> Iterator[Parameters]:
    """Set every tensor of a model on the meta device to its random value; yield parameters with their final values.

    A model that has values keeps them: its parameters are yielded at once. The consumer may replace the data of the
    yielded parameters.

    Raises:
        ConfigError: if the family leaves a tensor without a value.
    """
    if not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        yield list(model.parameters())
        return
    with initialization_context():
        yield from _Initializer(model, seed).run(model, "")


def initialize_weights(model: PreTrainedModel, seed: int) -> None:
    """Set every tensor of a model on the meta device to its random value. See `random_weights`."""
    deque(random_weights(model, seed), maxlen=0)


@torch.no_grad()
def initialize_buffers(model: PreTrainedModel) -> None:
    """Set the buffers of a model on the meta device to the values of the family; parameters stay there."""
    with marked_as_initialized(model.parameters()), initialization_context():
        deque(_BufferInitializer(model, 0).walk(model, "", model, in_block=False), maxlen=0)


@torch.no_grad()
def zero_weights(model: PreTrainedModel) -> Iterator[Parameters]:
    """Set the parameters of a model on the meta device to zero and its buffers to the values of the family.

    A checkpoint replaces them. A parameter with a shard record gets the memory of that shard only.
    """
    initialize_buffers(model)
    materialized: dict[nn.Parameter, nn.Parameter] = {}
    for module in list(model.modules()):
        for key, parameter in _local_parameters(module):
            if not parameter.is_meta:
                continue
            is_first = parameter not in materialized
            if is_first:
                shard = shard_of(parameter)
                shape = parameter.shape if shard is None or not shard.covers_full_tensor else shard.local_shape()
                value = torch.zeros(shape, dtype=parameter.dtype)
                materialized[parameter] = _with_attributes_of(parameter, value)
            setattr(module, key, materialized[parameter])
            if is_first:
                yield [materialized[parameter]]


@torch.no_grad()
def initialize_submodule(model: PreTrainedModel, name: str) -> Iterator[Parameters]:
    """Set the parameters of one module, which are on the meta device, to the values that the family computes."""
    with initialization_context():
        yield from _Initializer(model, 0).run(model.get_submodule(name), name)
