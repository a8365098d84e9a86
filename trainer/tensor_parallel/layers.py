"""Modules that compute with a sharded weight: biases of row layers, columns in several parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from trainer.distributed.collectives import Group, all_reduce
from trainer.errors import PlanError, Problem
from trainer.sharding.shard import shard_of
from trainer.tensor_parallel.hooks import on_output


def _computes_like(layer_class: type[nn.Module], plain: type[nn.Module]) -> bool:
    """Return whether a class is `plain`, or a subclass that computes the same."""
    if not issubclass(layer_class, plain):
        return False
    if layer_class.forward is plain.forward:
        return True
    try:
        with torch.random.fork_rng(devices=[]):
            layer, x_BI = layer_class(4, 3), torch.randn(2, 4)
            return bool(torch.allclose(layer(x_BI), plain.forward(layer, x_BI)))
    except Exception:  # another constructor or signature is another layer
        return False


class _RowLinear(nn.Linear):
    """A row layer with a bias, which is added once, after the sum over ranks."""

    reduce: Callable[[Tensor], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """`input` (..., in_features of this rank) gives (..., out_features)."""
        assert self.bias is not None
        return self.reduce(F.linear(input, self.weight)) + self.bias


class _RowConv1D(Conv1D):
    """GPT-2's transposed Linear as a row layer."""

    reduce: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """`x` (..., in_features of this rank) gives (..., out_features)."""
        return self.reduce(x @ self.weight) + self.bias


def make_row(module: nn.Module, reduce: Callable[[Tensor], Tensor]) -> None:
    """Pass the output of a row layer, before its bias is added, through `reduce`.

    Raises:
        PlanError: if the module has a bias and is neither a Linear nor a Conv1D.
    """
    if getattr(module, "bias", None) is None:
        on_output(module, reduce)
        return
    for plain, row in ((nn.Linear, _RowLinear), (Conv1D, _RowConv1D)):
        if _computes_like(type(module), plain):
            module.__class__ = row
            module.reduce = reduce  # type: ignore[assignment]
            return
    reason = f"{type(module).__name__} with a bias cannot be a row layer"
    raise PlanError(Problem("parallel.tensor_plan", reason, "Keep it full with 'replicate'"))


def shard_key(key: str, number: int) -> str:
    """Return the name of the parameter with a rank's shard `number` of parameter `key`."""
    return f"{key}_shard{number}" if number else key


class _SharedColumn(nn.Module):
    """Mixin for a column layer of which ranks share some matrices: its weight is in several parameters."""

    shard_count: int

    def _joined(self, key: str) -> Tensor | None:
        first: Tensor | None = getattr(self, key)
        if first is None:
            return None
        rest = [getattr(self, shard_key(key, number)) for number in range(1, self.shard_count)]
        return torch.cat([first, *rest], dim=-1 if isinstance(self, Conv1D) else 0)


class _SharedColumnLinear(_SharedColumn, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        """`input` (..., in_features) gives (..., out_features of this rank)."""
        weight = self._joined("weight")
        assert weight is not None
        return F.linear(input, weight, self._joined("bias"))


class _SharedColumnConv1D(_SharedColumn, Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        """`x` (..., in_features) gives (..., out_features of this rank)."""
        weight, bias = self._joined("weight"), self._joined("bias")
        assert weight is not None
        output = x @ weight
        return output if bias is None else output + bias


class _SharedChannels(_SharedColumn, nn.Conv1d):
    """A depthwise convolution, whose users read its weight and bias without calling it."""

    weight = property(lambda self: self._joined("weight"))
    bias = property(lambda self: self._joined("bias"))

    def _joined(self, key: str) -> Tensor | None:
        keys = [shard_key(key, number) for number in range(self.shard_count)]
        shards: list[Tensor] = [p for p in (self._parameters.get(k) for k in keys) if p is not None]
        return torch.cat(shards) if shards else None


def join_shards(module: nn.Module, count: int) -> None:
    """Make a column layer compute with a weight that is in `count` parameters.

    Raises:
        PlanError: if the module is neither a Linear, nor a Conv1D, nor a depthwise convolution.
    """
    classes = ((nn.Linear, _SharedColumnLinear), (Conv1D, _SharedColumnConv1D), (nn.Conv1d, _SharedChannels))
    for plain, shared in classes:
        if _computes_like(type(module), plain):
            module.__class__ = shared
            module.shard_count = count  # type: ignore[assignment]
            return
    reason = f"{type(module).__name__} cannot hold a part that several ranks share"
    raise PlanError(Problem("parallel.tensor_plan", reason, "Use a smaller parallel.tensor"))


def sum_gradient(parameter: nn.Parameter, group: Group) -> None:
    """Sum the parameter's gradient over the group in each backward pass, before any other hook sees it.

    The sum is installed once for each group, also if two pipeline stages on this rank share the parameter.
    """
    summed: list[Group] = parameter.__dict__.setdefault("tessera_summed", [])
    if parameter.requires_grad and not any(other is group for other in summed):
        summed.append(group)
        parameter.register_hook(lambda gradient: all_reduce(gradient, group))  # type: ignore[no-untyped-call]


def resize(module: nn.Module) -> None:
    """Set a module's attributes for the sizes of its weight to those of this rank's shard."""
    weight = dict(module.named_parameters(recurse=False, remove_duplicate=False)).get("weight")
    shard = None if weight is None else shard_of(weight)
    if shard is None or shard.is_full:
        return
    shape = shard.local_shape()
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, Conv1D):
        module.nf = shape[1]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = shape
    elif isinstance(module, nn.Conv1d) and module.groups > 1:
        channels = module.weight.shape[0]  # those in further parameters included
        module.groups = module.groups * channels // shard.full_shape[0]
        module.in_channels, module.out_channels = module.groups * shape[1], channels
