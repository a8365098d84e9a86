"""Styles of mixtures of experts and of latent attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from trainer.tensor_parallel import collectives
from trainer.tensor_parallel.hooks import on_inputs, on_output
from trainer.tensor_parallel.region import Region
from trainer.tensor_parallel.styles.base import ModuleStyle, ModuleTarget, ParameterStyle
from trainer.tensor_parallel.styles.replicated import Replicated
from trainer.tensor_parallel.units import parse_integer


@dataclass(frozen=True)
class Experts(ModuleStyle):
    """Experts with sharded parameters: input and routing weights enter, the output is summed: `moe_tp_experts`."""

    name: ClassVar[str] = "moe_tp_experts"
    starts_region: ClassVar[bool] = True

    def install(self, region: Region, target: ModuleTarget) -> None:
        """See `Style.install`."""
        on_inputs(target.module, lambda x: collectives.enter_region(x, region.group) if x.requires_grad else x)
        on_output(target.module, region.reduce)


@dataclass(frozen=True)
class IdentityExpert(ModuleStyle):
    """An expert that returns its input, inside a sum over ranks: `moe_identity_expert`."""

    name: ClassVar[str] = "moe_identity_expert"

    def install(self, region: Region, target: ModuleTarget) -> None:
        """See `Style.install`."""
        on_inputs(target.module, lambda x: x / region.ranks)


@dataclass(frozen=True)
class LatentProjection(ModuleStyle):
    """Full; the last qk_rope_head_dim outputs are used by sharded heads: `mla_kv_a_proj`."""

    name: ClassVar[str] = "mla_kv_a_proj"

    rotary_dim: int | None = None
    """Number of outputs; None for the configuration's `qk_rope_head_dim`."""

    @classmethod
    def parse(cls, argument: str) -> Self:
        """Read the number of outputs."""
        return cls(parse_integer(argument) if argument else None)

    @property
    def argument(self) -> str:
        """See `Style.argument`."""
        return "" if self.rotary_dim is None else str(self.rotary_dim)

    def parameter_style(self) -> ParameterStyle | None:
        """See `Style.parameter_style`."""
        return Replicated("its outputs are few, and used by all heads")

    def install(self, region: Region, target: ModuleTarget) -> None:
        """See `Style.install`."""
        holders: Any = (target.parent, getattr(target.module, "config", None), getattr(target.parent, "config", None))
        rotary_dim = self.rotary_dim or next(h.qk_rope_head_dim for h in holders if hasattr(h, "qk_rope_head_dim"))

        def enter_rotary(output: Tensor) -> Tensor:
            latent, rotary = torch.split(output, [output.shape[-1] - rotary_dim, rotary_dim], dim=-1)
            return torch.cat([latent, collectives.enter_region(rotary, region.group)], dim=-1)

        on_output(target.module, enter_rotary)
