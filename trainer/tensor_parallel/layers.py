"""What each style changes in a module, once its parameters are cut."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from trainer.distributed.collectives import Group, all_reduce, local_slice
from trainer.errors import PlanError, Problem
from trainer.sharding.shard import shard_of
from trainer.tensor_parallel import collectives
from trainer.tensor_parallel.hooks import on_argument, on_inputs, on_output
from trainer.tensor_parallel.plan import ModuleTarget
from trainer.tensor_parallel.region import Region
from trainer.tensor_parallel.styles import Style
from trainer.tensor_parallel.units import Scope


def _computes_as(kind: type[nn.Module], plain: type[nn.Module]) -> bool:
    """Whether `kind` is `plain`, or a subclass of it that computes the same."""
    if not issubclass(kind, plain):
        return False
    if kind.forward is plain.forward:
        return True
    try:
        with torch.random.fork_rng(devices=[]):
            other, x = kind(4, 3), torch.randn(2, 4)
            return bool(torch.allclose(other(x), plain.forward(other, x)))
    except Exception:  # another constructor, another signature: another layer
        return False


class _RowLinear(nn.Linear):
    """A row layer with a bias: added once, after the sum."""

    leave: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return self.leave(F.linear(x, self.weight)) + self.bias


class _RowConv1D(Conv1D):
    """GPT-2's transposed Linear as a row layer."""

    leave: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(x @ self.weight) + self.bias


def _row(module: nn.Module, leave: Callable[[Tensor], Tensor]) -> None:
    if getattr(module, "bias", None) is None:
        on_output(module, leave)
        return
    for plain, own in ((nn.Linear, _RowLinear), (Conv1D, _RowConv1D)):
        if _computes_as(type(module), plain):
            module.__class__ = own
            module.leave = leave  # type: ignore[assignment]
            return
    raise PlanError(
        Problem("parallel.tensor_plan", f"{type(module).__name__} with a bias cannot be a row layer",
                "Leave it whole with 'replicate'")
    )  # fmt: skip


class _SharedColumn(nn.Module):
    """Mixed into a column layer of which some matrices are shared by ranks: `weight` and `bias` are joined with theirs.

    Parameters of a piece are called `NAME_piece1`, ...
    """

    shards: int

    def _joined(self, name: str) -> Tensor | None:
        first: Tensor | None = getattr(self, name)
        if first is None:
            return None
        dim = -1 if isinstance(self, Conv1D) else 0
        return torch.cat([first, *(getattr(self, f"{name}_piece{n}") for n in range(1, self.shards))], dim=dim)


class _SharedColumnLinear(_SharedColumn, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        weight = self._joined("weight")
        assert weight is not None
        return F.linear(x, weight, self._joined("bias"))


class _SharedColumnConv1D(_SharedColumn, Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._joined("weight"), self._joined("bias")
        assert weight is not None
        joined = x @ weight
        return joined if bias is None else joined + bias


class _SharedChannels(_SharedColumn, nn.Conv1d):
    """A depthwise convolution, whose weight and bias its users read without calling it."""

    weight = property(lambda self: self._joined("weight"))
    bias = property(lambda self: self._joined("bias"))

    def _joined(self, name: str) -> Tensor | None:
        names = [name, *(f"{name}_piece{n}" for n in range(1, self.shards))]
        held: list[Tensor] = [p for p in (self._parameters.get(n) for n in names) if p is not None]
        return torch.cat(held) if held else None


def share_pieces(module: nn.Module, count: int) -> None:
    """Makes a column layer of one whose weight lies in `count` parameters."""
    for plain, own in ((nn.Linear, _SharedColumnLinear), (Conv1D, _SharedColumnConv1D), (nn.Conv1d, _SharedChannels)):
        if _computes_as(type(module), plain):
            module.__class__ = own
            module.shards = count  # type: ignore[assignment]
            return
    raise PlanError(
        Problem("parallel.tensor_plan", f"{type(module).__name__} cannot hold a part that several ranks share",
                "Use a smaller parallel.tensor")
    )  # fmt: skip


class _RMSNorm(nn.Module):
    """An RMS norm over a dimension that is cut: the mean square is that of the whole (Zhang & Sennrich 2019).

    Where ranks share units, each unit is held by equally many, so the mean over all ranks' parts is that of the whole.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        region: Region = self.region  # type: ignore[assignment]
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        total = collectives.enter_region(region.reduce(wide.square().sum(-1, keepdim=True)), region.group)
        normed = wide * torch.rsqrt(total / (wide.shape[-1] * region.ranks) + self.epsilon)  # type: ignore[operator]
        scaled: Tensor = self.weight * normed.to(hidden_states.dtype)  # type: ignore[operator]
        return scaled


def _install_rms_norm(region: Region, target: ModuleTarget, style: Style) -> None:
    module = target.module
    epsilon = next((getattr(module, n) for n in ("variance_epsilon", "eps", "epsilon") if hasattr(module, n)), None)
    if epsilon is None or [n for n, _ in module.named_parameters()] != ["weight"]:
        raise PlanError(Problem("parallel.tensor_plan", f"{target.name} ({type(module).__name__}) is not an RMS norm"))
    own = type(f"Cut{type(module).__name__}", (_RMSNorm, type(module)), {})
    module.__class__ = own
    module.region, module.epsilon = region, epsilon  # type: ignore[assignment]


class _PerHeadNorms(nn.Module):
    """Layer norms of a list, one for each head, of which this rank applies those of its heads.

    Every rank reads all of them, in the same order: each then has a gradient on every rank, zero for other ranks'
    heads, and the sums over ranks meet.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Args:
        hidden_states: (batch, heads of this rank, sequence, head size)
        """
        region: Region = self.region  # type: ignore[assignment]
        norms = [norm for norm in self.norms if isinstance(norm, nn.LayerNorm)]  # type: ignore[union-attr]
        weights = torch.stack([norm.weight for norm in norms])
        own = weights.narrow(0, region.rank * len(norms) // region.ranks, hidden_states.shape[1])
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        normed = F.layer_norm(wide, hidden_states.shape[-1:], eps=norms[0].eps) * own.unsqueeze(1).to(wide.dtype)
        return normed.to(hidden_states.dtype)


def _install_per_head_norms(region: Region, target: ModuleTarget, style: Style) -> None:
    norms = getattr(target.module, "norms", None)
    if not isinstance(norms, nn.ModuleList) or not all(
        isinstance(norm, nn.LayerNorm) and norm.bias is None for norm in norms
    ):
        raise PlanError(Problem("parallel.tensor_plan", f"{target.name} is not a list of layer norms without biases"))
    target.module.__class__ = type(f"Cut{type(target.module).__name__}", (_PerHeadNorms, type(target.module)), {})
    target.module.region = region  # type: ignore[assignment]


class _GroupedRMSNorm(nn.Module):
    """A gated RMS norm over groups of a cut dimension, each of which lies on several ranks."""

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        region: Region = self.region  # type: ignore[assignment]
        groups: int = self.groups  # type: ignore[assignment]
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        gated = 1.0 if gate is None else F.silu(gate.to(wide.dtype))
        if not self.norm_before_gate:
            wide = wide * gated
        mine = F.one_hot(torch.tensor(region.rank * groups // region.ranks, device=wide.device), groups)
        sums = region.enter(region.reduce(wide.square().sum(-1, keepdim=True) * mine))
        total = (sums * mine).sum(-1, keepdim=True)
        size = wide.shape[-1] * region.ranks // groups
        normed = wide * torch.rsqrt(total / size + self.epsilon)  # type: ignore[operator]
        scaled: Tensor = self.weight * normed.to(hidden_states.dtype)  # type: ignore[operator]
        return (scaled * gated).to(hidden_states.dtype) if self.norm_before_gate else scaled


def _install_grouped_rms_norm(region: Region, target: ModuleTarget, style: Style) -> None:
    module: Any = target.module
    if not list(module.parameters()):
        return
    shard = shard_of(module.weight)
    assert shard is not None
    groups = module.n_groups if hasattr(module, "n_groups") else shard.full_shape[0] // module.group_size
    if groups % region.ranks == 0:
        if hasattr(module, "n_groups"):
            module.n_groups = groups // region.ranks
        return
    before = getattr(module, "norm_before_gate", False)
    module.__class__ = type(f"Cut{type(module).__name__}", (_GroupedRMSNorm, type(module)), {})
    module.region, module.groups, module.epsilon = region, groups, module.variance_epsilon
    module.norm_before_gate = before


def _install_column(region: Region, target: ModuleTarget, style: Style) -> None:
    if isinstance(target.module, nn.Embedding):
        return  # token ids have no gradient
    if not list(target.module.parameters(recurse=False)):
        return

    on_inputs(target.module, region.column_input_hook(target.module))


def _install_gathered_column(region: Region, target: ModuleTarget, style: Style) -> None:
    if not list(target.module.parameters(recurse=False)):
        return  # an identity in its place
    on_inputs(target.module, region.enter)
    on_output(target.module, lambda y: collectives.gather_from_region(y, -1, region.group))


def _install_head(region: Region, target: ModuleTarget, style: Style) -> None:
    on_inputs(target.module, region.enter)


def _install_row(region: Region, target: ModuleTarget, style: Style) -> None:
    _row(target.module, region.row_output_hook(target.module))


def _install_split_row(region: Region, target: ModuleTarget, style: Style) -> None:
    on_inputs(target.module, lambda x: collectives.split_to_region(x, -1, region.group))
    _row(target.module, region.row_output_hook(target.module))


def _install_entering_row(region: Region, target: ModuleTarget, style: Style) -> None:
    _row(target.module, lambda y: collectives.enter_region(region.reduce(y), region.group))


def _install_scattering_row(region: Region, target: ModuleTarget, style: Style) -> None:
    if getattr(target.module, "bias", None) is not None:
        raise PlanError(Problem("parallel.tensor_plan", f"{target.name} has a bias, and cannot scatter its outputs"))
    on_output(target.module, lambda y: collectives.reduce_scatter_sequence(y, -1, region.group))


def _install_vocabulary_embedding(region: Region, target: ModuleTarget, style: Style) -> None:
    """Each rank looks up the ids it has, zero for the others, and the ranks' results are summed."""
    table = target.module
    assert isinstance(table, nn.Embedding)
    shard = shard_of(table.weight)
    assert shard is not None
    rows = shard.local_shape()[0]
    first = shard.index * rows
    padding = table.padding_idx
    table.padding_idx = padding - first if padding is not None and 0 <= padding - first < rows else None
    elsewhere: list[Tensor] = []

    def localise(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not args:
            (key,) = kwargs
            args, kwargs = (kwargs[key],), {}
        ids = args[0] - first
        outside = (ids < 0) | (ids >= rows)
        elsewhere.append(outside)
        return (ids.masked_fill(outside, 0), *args[1:]), kwargs

    def join(_: nn.Module, __: tuple[Any, ...], vectors: Tensor) -> Tensor:
        return region.reduce(vectors.masked_fill(elsewhere.pop().unsqueeze(-1), 0))

    table.register_forward_pre_hook(localise, with_kwargs=True)
    table.register_forward_hook(join)


def _install_wide_embedding(region: Region, target: ModuleTarget, style: Style) -> None:
    on_output(target.module, lambda y: collectives.gather_from_region(y, -1, region.group))


def sum_gradient(parameter: nn.Parameter, group: Group) -> None:
    """Sums the parameter's gradient over the group, before anybody else sees it; once for each group, also where two
    pipeline stages on this rank share the parameter, and both say so."""
    summed: list[Group] = parameter.__dict__.setdefault("tessera_summed", [])
    if parameter.requires_grad and not any(other is group for other in summed):
        summed.append(group)
        parameter.register_hook(lambda gradient: all_reduce(gradient, group))  # type: ignore[no-untyped-call]


def _install_experts(region: Region, target: ModuleTarget, style: Style) -> None:
    on_inputs(target.module, lambda x: collectives.enter_region(x, region.group) if x.requires_grad else x)
    on_output(target.module, region.reduce)


def _install_identity_expert(region: Region, target: ModuleTarget, style: Style) -> None:
    on_inputs(target.module, lambda x: x / region.ranks)


def _install_latent(region: Region, target: ModuleTarget, style: Style) -> None:
    places: Any = (target.parent, getattr(target.module, "config", None), getattr(target.parent, "config", None))
    rope = int(style.argument or next(p.qk_rope_head_dim for p in places if hasattr(p, "qk_rope_head_dim")))

    def change(y: Tensor) -> Tensor:
        latent, rotary = torch.split(y, [y.shape[-1] - rope, rope], dim=-1)
        return torch.cat([latent, collectives.enter_region(rotary, region.group)], dim=-1)

    on_output(target.module, change)


def _install_sum(region: Region, target: ModuleTarget, style: Style) -> None:
    on_output(target.module, region.reduce)


def _install_entrance(region: Region, target: ModuleTarget, style: Style) -> None:
    on_inputs(target.module, lambda x: region.enter(x) if x.requires_grad else x)


def _install_passage(region: Region, target: ModuleTarget, style: Style) -> None:
    on_inputs(target.module, lambda x: x if region.is_sequence_sharded else region.enter(x))


def _install_silence(region: Region, target: ModuleTarget, style: Style) -> None:
    region.skip_input_reduce(target.module)


def _install_pair(region: Region, target: ModuleTarget, style: Style) -> None:
    first, second = style.argument.split(",")
    region.fuse_reductions(target.module.get_submodule(first), target.module.get_submodule(second))


def _install_output_entrance(region: Region, target: ModuleTarget, style: Style) -> None:
    if not style.argument:
        on_output(target.module, region.enter)
        return
    which = int(style.argument)

    def hook(_: nn.Module, __: tuple[Any, ...], output: tuple[Any, ...]) -> tuple[Any, ...]:
        entered = collectives.enter_region(output[which], region.group)
        return (*output[:which], entered, *output[which + 1 :])

    target.module.register_forward_hook(hook)


def _install_joined_output(region: Region, target: ModuleTarget, style: Style) -> None:
    on_output(target.module, lambda y: collectives.gather_from_region(y, -1, region.group))


def _install_joined_input(region: Region, target: ModuleTarget, style: Style) -> None:
    whole = getattr(target.module, "in_features", None)
    on_inputs(target.module, lambda x: x if x.shape[-1] == whole else region.restore_input(x))


def _install_narrowed_input(region: Region, target: ModuleTarget, style: Style) -> None:
    """For a module that gives its result the shape of its input: it sees the size of the part.

    Its column layers get the whole input back, and no gradient passes through the slice.
    """
    on_argument(target.module, next(iter(inspect.signature(target.module.forward).parameters)), region.slice_input)


def _install_residual_inside(region: Region, target: ModuleTarget, style: Style) -> None:
    """For a module that computes `child(h + part of a sum)` of its inputs h: each rank adds h, so all but one are taken
    off the sum again. They are taken off outside the region, which leaves the gradient of h whole.
    """
    whole: list[Tensor] = []

    def enter(x: Tensor) -> Tensor:
        whole.append(x)
        return region.enter(x)

    def leave(x: Tensor) -> Tensor:
        return region.reduce(x) - (region.ranks - 1) * whole.pop(0)

    target.module.register_forward_pre_hook(lambda *_: whole.clear())
    on_inputs(target.module, lambda x: enter(x) if x.requires_grad else x)
    on_inputs(target.module.get_submodule(style.argument), leave)


def _install_split_output(region: Region, target: ModuleTarget, style: Style) -> None:
    if not style.argument:
        on_output(target.module, lambda y: collectives.split_to_region(y, -1, region.group))
        return
    which, dim = (int(n) for n in style.argument.split(":"))

    def hook(_: nn.Module, __: tuple[Any, ...], outputs: Any) -> Any:
        part = collectives.split_to_region(outputs[which], dim, region.group)
        return (*outputs[:which], part, *outputs[which + 1 :])

    target.module.register_forward_hook(hook)


def _install_split_input(region: Region, target: ModuleTarget, style: Style) -> None:
    name, dim_text, *heads_text = style.argument.split(":")
    dim = int(dim_text)
    heads = getattr(target.module, heads_text[0]) if heads_text else None

    def extract(value: Tensor) -> Tensor:
        if value.shape[dim] == 1:  # one for all heads
            return value
        if heads is None:
            return local_slice(value, dim, region.group)
        shape = (*value.shape[:dim], -1, heads * region.ranks, *value.shape[dim + 1 :])
        grouped = value.reshape(shape)
        return local_slice(grouped, dim + 1, region.group).flatten(dim, dim + 1)

    on_argument(target.module, name, extract)


def _install_divided(region: Region, target: ModuleTarget, style: Style) -> None:
    """`config.NAME` divides it in a configuration of the module's own; `NAME?` passes over modules that lack it.

    `NAME=SUM` computes a number from those that are divided already.
    """
    for item in (n.strip() for n in style.argument.split(",")):
        name = item.removesuffix("?")
        holder: Any = target.module
        if "=" in name:
            name, _, expression = name.partition("=")
            if not name.endswith("?") or hasattr(holder, name.removesuffix("?")):
                setattr(holder, name.removesuffix("?"), Scope(holder).number(expression))
            continue
        if name.startswith("config."):
            name = name.removeprefix("config.")
            holder = target.module.config = copy.copy(target.module.config)
        value = getattr(holder, name, None)
        if value is None and item.endswith("?"):
            continue
        if not isinstance(value, int):
            raise PlanError(Problem("parallel.tensor_plan", f"{target.name} has no number '{name}' to divide"))
        if value % region.ranks and region.ranks % value:
            raise PlanError(
                Problem("parallel.tensor", f"{target.name}.{name} = {value} cannot be divided by {region.ranks}")
            )
        setattr(holder, name, max(1, value // region.ranks))


def _install_unfused(region: Region, target: ModuleTarget, style: Style) -> None:
    """Such a module takes the fused path in training only, and nothing else in it depends on that."""
    if style.argument and not hasattr(target.module, style.argument):
        return
    plain = type(target.module)
    never = property(lambda self: False, lambda self, value: None)
    target.module.__class__ = type(plain.__name__, (plain,), {"training": never})


def _install_nothing(region: Region, target: ModuleTarget, style: Style) -> None:
    """The parameters are all there is to it."""


def resize(module: nn.Module) -> None:
    """Makes the sizes that a module keeps about its weight those of the part it holds."""
    weight = module._parameters.get("weight")
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
        channels = module.weight.shape[0]  # with those that are shared
        module.groups = module.groups * channels // shard.full_shape[0]
        module.in_channels, module.out_channels = module.groups * shape[1], channels


INSTALL: dict[str, Callable[[Region, ModuleTarget, Style], None]] = {
    "colwise": _install_column,
    "kv_colwise": _install_column,
    "packed_colwise": _install_column,
    "vocabulary_head": _install_head,
    "colwise_gather_output": _install_gathered_column,
    "rowwise": _install_row,
    "packed_rowwise": _install_row,
    "rowwise_split_input": _install_split_row,
    "rowwise_enter": _install_entering_row,
    "rowwise_scatter_output": _install_scattering_row,
    "cut": _install_nothing,
    "vocabulary": _install_nothing,
    "embedding_rowwise": _install_vocabulary_embedding,
    "embedding_colwise": _install_wide_embedding,
    "rms_norm": _install_rms_norm,
    "per_head_norms": _install_per_head_norms,
    "replicated_with_grad_allreduce": _install_nothing,
    "replicate": _install_nothing,
    "first_rank": _install_nothing,
    "moe_tp_experts": _install_experts,
    "moe_identity_expert": _install_identity_expert,
    "mla_kv_a_proj": _install_latent,
    "all_reduce": _install_sum,
    "enter_through": _install_passage,
    "inside": _install_silence,
    "parallel_residual": _install_pair,
    "enter": _install_entrance,
    "enter_output": _install_output_entrance,
    "gather_input": _install_joined_input,
    "gather_output": _install_joined_output,
    "split_output": _install_split_output,
    "narrow_input": _install_narrowed_input,
    "residual_inside": _install_residual_inside,
    "needs": _install_nothing,
    "split_input": _install_split_input,
    "divide": _install_divided,
    "local_params": _install_nothing,
    "grouped_rms_norm": _install_grouped_rms_norm,
    "unfused": _install_unfused,
}
"""What installs each style on a module."""
