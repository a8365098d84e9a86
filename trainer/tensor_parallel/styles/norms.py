"""Styles of norms whose dimension, or whose heads, are sharded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.errors import PlanError, Problem
from trainer.sharding.shard import shard_of
from trainer.tensor_parallel import collectives
from trainer.tensor_parallel.region import Region
from trainer.tensor_parallel.styles.base import ColumnStyle, ModuleStyle, ModuleTarget


def _mix_in(module: nn.Module, mixin: type[nn.Module]) -> None:
    """Make the module compute with the forward of `mixin`."""
    module.__class__ = type(f"Sharded{type(module).__name__}", (mixin, type(module)), {})


def _promoted(x: Tensor) -> Tensor:
    """Return `x` in fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _RMSNorm(nn.Module):
    """An RMS norm over a sharded dimension: its mean square is that of the full dimension (Zhang & Sennrich 2019).

    Where ranks share units, each unit is held by equally many ranks, so that the mean over all shards is the mean over
    the full dimension.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `hidden_states` (..., features of this rank) to the same shape."""
        region: Region = self.region  # type: ignore[assignment]
        wide = _promoted(hidden_states)
        total = collectives.enter_region(region.reduce(wide.square().sum(-1, keepdim=True)), region.group)
        normed = wide * torch.rsqrt(total / (wide.shape[-1] * region.ranks) + self.epsilon)  # type: ignore[operator]
        scaled: Tensor = self.weight * normed.to(hidden_states.dtype)  # type: ignore[operator]
        return scaled


@dataclass(frozen=True)
class RMSNorm(ColumnStyle):
    """An RMS norm over a sharded dimension, its mean square summed over ranks: `rms_norm[:parts, as in cut]`."""

    name: ClassVar[str] = "rms_norm"
    allows_sharded_sequence: ClassVar[bool] = True

    def install(self, region: Region, target: ModuleTarget) -> None:
        """See `Style.install`."""
        module = target.module
        epsilon = next((getattr(module, n) for n in ("variance_epsilon", "eps", "epsilon") if hasattr(module, n)), None)
        if epsilon is None or [n for n, _ in module.named_parameters()] != ["weight"]:
            reason = f"{target.name} ({type(module).__name__}) is not an RMS norm"
            raise PlanError(Problem("parallel.tensor_plan", reason))
        _mix_in(module, _RMSNorm)
        module.region, module.epsilon = region, epsilon  # type: ignore[assignment]


class _PerHeadNorms(nn.Module):
    """Layer norms of a list, one for each head, of which this rank applies those of its heads.

    Every rank reads all of them, in the same order: each then has a gradient on every rank, zero for other ranks'
    heads, and the ranks' sums over the gradients come in the same order.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `hidden_states` (batch, heads of this rank, sequence, head size) to the same shape."""
        region: Region = self.region  # type: ignore[assignment]
        norms = [norm for norm in self.norms if isinstance(norm, nn.LayerNorm)]  # type: ignore[union-attr]
        weights_HD = torch.stack([norm.weight for norm in norms])
        local_HD = weights_HD.narrow(0, region.rank * len(norms) // region.ranks, hidden_states.shape[1])
        wide = _promoted(hidden_states)
        normed = F.layer_norm(wide, hidden_states.shape[-1:], eps=norms[0].eps)
        scaled: Tensor = normed * local_HD.unsqueeze(1).to(wide.dtype)
        return scaled.to(hidden_states.dtype)


@dataclass(frozen=True)
class PerHeadNorms(ModuleStyle):
    """A module that applies its list `norms`, one for each head, to this rank's heads: `per_head_norms`."""

    name: ClassVar[str] = "per_head_norms"
    allows_sharded_sequence: ClassVar[bool] = True

    def install(self, region: Region, target: ModuleTarget) -> None:
        """See `Style.install`."""
        norms = getattr(target.module, "norms", None)
        if not isinstance(norms, nn.ModuleList) or not all(
            isinstance(norm, nn.LayerNorm) and norm.bias is None for norm in norms
        ):
            reason = f"{target.name} is not a list of layer norms without biases"
            raise PlanError(Problem("parallel.tensor_plan", reason))
        _mix_in(target.module, _PerHeadNorms)
        target.module.region = region  # type: ignore[assignment]


class _GroupedRMSNorm(nn.Module):
    """A gated RMS norm over groups of a sharded dimension, each of which several ranks hold."""

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        """Map `hidden_states` and `gate` (..., features of this rank) to the same shape."""
        region: Region = self.region  # type: ignore[assignment]
        groups: int = self.groups  # type: ignore[assignment]
        wide = _promoted(hidden_states)
        gated = 1.0 if gate is None else F.silu(gate.to(wide.dtype))
        if not self.norm_before_gate:
            wide = wide * gated
        # One number for each group, nonzero for this rank's only: a single sum serves all groups.
        mask_G = F.one_hot(torch.tensor(region.rank * groups // region.ranks, device=wide.device), groups)
        sums = region.enter(region.reduce(wide.square().sum(-1, keepdim=True) * mask_G))  # (..., groups)
        total = (sums * mask_G).sum(-1, keepdim=True)
        size = wide.shape[-1] * region.ranks // groups
        normed = wide * torch.rsqrt(total / size + self.epsilon)  # type: ignore[operator]
        scaled: Tensor = self.weight * normed.to(hidden_states.dtype)  # type: ignore[operator]
        return (scaled * gated).to(hidden_states.dtype) if self.norm_before_gate else scaled


@dataclass(frozen=True)
class GroupedRMSNorm(ColumnStyle):
    """A gated RMS norm over groups of a sharded dimension, its mean squares summed over ranks: `grouped_rms_norm`."""

    name: ClassVar[str] = "grouped_rms_norm"
    allows_sharded_sequence: ClassVar[bool] = True

    def install(self, region: Region, target: ModuleTarget) -> None:
        """See `Style.install`."""
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
        norm_before_gate = getattr(module, "norm_before_gate", False)
        _mix_in(module, _GroupedRMSNorm)
        module.region, module.groups, module.epsilon = region, groups, module.variance_epsilon
        module.norm_before_gate = norm_before_gate
