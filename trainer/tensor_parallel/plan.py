"""The tensor plan of one model for one rank: the style of each parameter, buffer and module.

A plan maps names to styles. A name is that of a module or a parameter, with `*` for the numbers in it; it is relative
to the base model, as in Hugging Face's plans, or a full name. `docs/tensor_plans.md` explains how to write one:

    "layers.*.self_attn.q_proj": "colwise:head_dim"
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn

from trainer.sharding import Shard, is_remote
from trainer.tensor_parallel.layers import shard_key
from trainer.tensor_parallel.styles import FullStyle, ModuleTarget, ParameterStyle


@dataclass(frozen=True)
class PlanEntry:
    """A parameter and its shards."""

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    style: ParameterStyle
    shards: tuple[Shard, ...]
    """This rank's shards of it; several if ranks share a part of a fused weight."""

    def local_parameters(self, module: nn.Module) -> Iterator[tuple[nn.Parameter, Shard]]:
        """Yield the parameters of `module`, which has it, that hold its shards after `Mapper.shard_parameters`."""
        key = self.name.rpartition(".")[2]
        parameters = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        for number, shard in enumerate(self.shards):
            yield parameters[shard_key(key, number)], shard

    @property
    def is_sharded(self) -> bool:
        """Whether this rank holds only a part of it."""
        return not all(shard.is_full for shard in self.shards)

    @property
    def is_divided(self) -> bool:
        """Whether its style divides it into units among the ranks; there may be one unit, which all ranks share."""
        return not isinstance(self.style, FullStyle)


@dataclass(frozen=True)
class Plan:
    """The audited plan of one model, for one rank."""

    entries: list[PlanEntry]
    targets: list[ModuleTarget]
    """Modules that are changed."""

    buffers: dict[str, tuple[Shard, ...]]
    """Buffers that are sharded, by name."""

    def local_to(self, model: nn.Module) -> Plan:
        """Return the part of the plan for the pipeline stage of `model`."""
        local_names = dict(model.named_parameters(remove_duplicate=False))
        return Plan(
            [entry for entry in self.entries if entry.name in local_names],
            [target for target in self.targets if not is_remote(target.module)],
            {n: s for n, s in self.buffers.items() if not is_remote(model.get_submodule(n.rpartition(".")[0]))},
        )

    def sharded_fraction(self, blocks: Collection[str] = ("",)) -> float:
        """Return which fraction of the matrix elements in `blocks` (names of modules; by default all) is sharded."""
        prefixes = tuple(f"{block}." if block else "" for block in blocks)
        sharded = total = 0
        for entry in self.entries:
            if len(entry.shape) >= 2 and entry.name.startswith(prefixes):
                numel = math.prod(entry.shape)
                total += numel
                sharded += numel if entry.is_sharded else 0
        return sharded / total if total else 0.0
