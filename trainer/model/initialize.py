"""Random weights: the family's own initialisation, the same in every layout, one module at a time.

Each module is made whole, seeded by (seed, its name), and handed on before the next is made. So a rank never
needs the whole model, and what it holds does not depend on how many ranks there are.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.initialization import TORCH_INIT_FUNCTIONS, guard_torch_init_functions

from trainer.errors import ConfigError, Problem
from trainer.sharding import shard_of

Complete = Callable[[list[nn.Parameter]], object]


def _seed_of(seed: int, name: str) -> int:
    return (seed * 0x9E3779B97F4A7C15 + zlib.crc32(name.encode())) % (1 << 63)


def _touch(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    return tensor.zero_()


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which tensors are written to, by their storage."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reached: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        given |= kwargs or {}
        for argument in func._schema.arguments:
            tensor = given.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(tensor, Tensor):
                self.reached.add(tensor.untyped_storage()._cdata)
        return func(*args, **(kwargs or {}))


class _Initializer:
    """Walks a model on the meta device, children before parents, and gives every tensor its value."""

    def __init__(self, model: PreTrainedModel, seed: int, complete: Complete) -> None:
        self._model, self._seed, self._complete = model, seed, complete
        self._made: dict[nn.Parameter, nn.Parameter] = {}
        """From a meta parameter to the real one, for weights that several modules share."""

        self._last: dict[nn.Parameter, nn.Module] = {}
        """From a meta parameter to the last module above its own that sets it; see `_survey`."""

        self._waiting: dict[nn.Parameter, str] = {}
        """Real ones of these parameters, and their names, until that module has been made."""

        self._absent: dict[nn.Module, list[tuple[nn.Module, str]]] = defaultdict(list)
        """By module above, the parameters that it sets and that are on other stages: (module, key)."""

        self._plain: PreTrainedModel | None = None

    def run(self, module: nn.Module, name: str) -> None:
        """Makes `module`, which the model calls `name`, and all below it."""
        functions = dict(TORCH_INIT_FUNCTIONS)
        TORCH_INIT_FUNCTIONS.update(dict.fromkeys(functions, _touch))  # some of torch's do nothing on the meta device
        try:
            self._survey(module, self._model)
        finally:
            TORCH_INIT_FUNCTIONS.update(functions)
        self.walk(module, name, self._model, block=False)

    def _survey(self, module: nn.Module, owner: PreTrainedModel) -> None:
        """Finds out which modules outside blocks set the weights of modules below them, as T5 sets its embedding's when
        it comes to the whole model: lets them, while all is on the meta device. Such a weight is handed on only then.
        """
        owner = module if isinstance(module, PreTrainedModel) else owner
        children = [] if isinstance(module, nn.ModuleList) else list(module.children())
        for child in children:
            self._survey(child, owner)
        if not children:
            return
        with _Writes() as writes:
            try:
                owner._init_weights(module)
                reached = writes.reached
            except Exception:  # what cannot be done without values may set anything
                reached = None
        for inner in module.modules():
            if inner is module:
                continue
            for key, parameter in (*inner._parameters.items(), *vars(inner).items()):
                if not isinstance(parameter, nn.Parameter) or not parameter.is_meta:
                    continue
                if reached is None or parameter.untyped_storage()._cdata in reached:
                    self._last[parameter] = module
                    if key in vars(inner):
                        self._absent[module].append((inner, key))

    def walk(self, module: nn.Module, name: str, owner: PreTrainedModel, block: bool) -> None:
        """Makes `module` and all below it.

        Args:
            owner: the nearest model above, whose `_init_weights` knows the family's rules.
            block: whether the module lies inside a block. A family may set a block's inner weights when it
                comes to the block itself (GPT-2 scales its residual projections so), never across blocks;
                therefore a block is handed on as a whole, and what lies outside blocks module by module.
        """
        owner = module if isinstance(module, PreTrainedModel) else owner
        for key, child in module.named_children():
            inside = block or isinstance(module, nn.ModuleList)
            self.walk(child, f"{name}.{key}" if name else key, owner, inside)
            if inside and not block:
                self._hand_on(list(child.named_parameters()) + list(child.named_buffers()), f"{name}.{key}")
        shared = self._materialise(module, name)
        torch.manual_seed(_seed_of(self._seed, name))
        for parameter in shared:
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        with self._absent_made(module):
            owner._init_weights(module)
        for parameter in shared:
            del parameter._is_hf_initialized  # type: ignore[attr-defined]
        for meta in [meta for meta, last in self._last.items() if last is module and meta in self._made]:
            real = self._made[meta]
            self._hand_on([(self._waiting.pop(real), real)], "")
        if not block:
            self._hand_on([*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)], name)

    @contextmanager
    def _absent_made(self, module: nn.Module) -> Iterator[None]:
        """Meanwhile parameters of other stages that `module` sets have memory: so that the random numbers that follow
        are the same on all stages."""
        absent = [(inner, key, vars(inner)[key]) for inner, key in self._absent[module]]
        for inner, key, parameter in absent:
            vars(inner)[key] = nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False)
        yield
        for inner, key, parameter in absent:
            vars(inner)[key] = parameter

    def _materialise(self, module: nn.Module, name: str) -> list[nn.Parameter]:
        """Gives the module's own tensors memory, filled with NaN; returns those that had it already."""
        shared = []
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if parameter in self._made:
                shared.append(self._made[parameter])
            elif parameter.is_meta:
                real = nn.Parameter(torch.full_like(parameter, torch.nan, device="cpu"), parameter.requires_grad)
                real.__dict__.update(parameter.__dict__)
                self._made[parameter] = real
                if parameter in self._last:
                    self._waiting[real] = f"{name}.{key}" if name else key
            else:
                continue
            module._parameters[key] = self._made[parameter]
        self._materialise_buffers(module)
        return shared

    @staticmethod
    def _materialise_buffers(module: nn.Module) -> None:
        for key, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                unset = torch.nan if buffer.is_floating_point() else 0
                module._buffers[key] = torch.full_like(buffer, unset, device="cpu")

    def _hand_on(self, tensors: list[tuple[str, Tensor]], prefix: str) -> None:
        tensors = [(key, tensor) for key, tensor in tensors if tensor not in self._waiting]
        for key, tensor in tensors:
            if tensor.is_floating_point() and tensor.numel() and bool(tensor.isnan().any()):
                tensor.copy_(self._constructed(f"{prefix}.{key}" if prefix else key))
        self._complete([t for _, t in tensors if isinstance(t, nn.Parameter)])

    def _constructed(self, name: str) -> Tensor:
        """The value that the family's constructor gives `name`, where its `_init_weights` gives none.

        Two families of transformers 5.23 need it (openai-gpt, falcon_h1): the model is constructed once, whole.
        """
        if self._plain is None:
            torch.manual_seed(self._seed)
            self._plain = type(self._model)(self._model.config)
        value = dict(self._plain.named_parameters()) | dict(self._plain.named_buffers())
        if value[name].is_floating_point() and bool(value[name].isnan().any()):
            raise ConfigError(
                Problem("model.initialize", f"'{self._model.config.model_type}' gives no random value to {name}",
                        "Set model.initialize to 'pretrained'")
            )  # fmt: skip
        return value[name]


@torch.no_grad()
def initialize_weights(model: PreTrainedModel, seed: int, complete: Complete = lambda parameters: None) -> None:
    """Gives every tensor of a model on the meta device its random value; a model that has values keeps them.

    Args:
        complete: called with parameters once they have their final value; it may leave a part of each (tensor
            parallelism), or take them away (ZeRO-3).

    Raises:
        ConfigError: naming the tensor, if the family leaves one without a value.
    """
    if not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        complete(list(model.parameters()))
        return
    with torch.random.fork_rng(devices=[]), guard_torch_init_functions():
        _Initializer(model, seed, complete).run(model, "")


class _BufferInitializer(_Initializer):
    """The same walk for the buffers alone; the parameters stay where they are."""

    def _materialise(self, module: nn.Module, name: str) -> list[nn.Parameter]:
        self._materialise_buffers(module)
        return []

    def _hand_on(self, tensors: list[tuple[str, Tensor]], prefix: str) -> None:
        super()._hand_on([(key, t) for key, t in tensors if not isinstance(t, nn.Parameter)], prefix)


@torch.no_grad()
def initialize_buffers(model: PreTrainedModel) -> None:
    """Gives the buffers of a model on the meta device the values that its family computes; parameters stay there."""
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    with torch.random.fork_rng(devices=[]), guard_torch_init_functions():
        _BufferInitializer(model, 0, lambda nothing: None).walk(model, "", model, block=False)
    for parameter in parameters:
        del parameter._is_hf_initialized  # type: ignore[attr-defined]


@torch.no_grad()
def leave_blank(model: PreTrainedModel, complete: Complete = lambda parameters: None) -> None:
    """Gives the parameters of a model on the meta device memory and the value zero, for a checkpoint to fill, and its
    buffers the values that its family computes. A parameter with the record of a shard gets that part's memory only.
    """
    initialize_buffers(model)
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in list(model.modules()):
        for key, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            if parameter in made:
                module._parameters[key] = made[parameter]
                continue
            shard = shard_of(parameter)
            shape = parameter.shape if shard is None or not shard.covers_full_tensor else shard.local_shape()
            real = nn.Parameter(torch.zeros(shape, dtype=parameter.dtype), parameter.requires_grad)
            real.__dict__.update(parameter.__dict__)
            made[parameter] = module._parameters[key] = real
            complete([real])


@torch.no_grad()
def initialize_module(model: PreTrainedModel, name: str, complete: Complete) -> None:
    """Gives the parameters of one module, which are on the meta device, the values that its family computes."""
    module = model.get_submodule(name)
    with torch.random.fork_rng(devices=[]), guard_torch_init_functions():
        _Initializer(model, 0, complete).run(module, name)
