"""Weights that several stages hold: tied embeddings, and whatever else layers far apart have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from torch import nn

from trainer.distributed import World
from trainer.sharding import Shard, shard_of

LocalParameters = dict[str, list[tuple[nn.Parameter, Shard | None]]]
"""What a rank holds of each weight, by the weight's first name."""


def local_parameters(models: Sequence[nn.Module]) -> LocalParameters:
    """What this rank's stages hold of each weight; what two of them share, once."""
    found: LocalParameters = {}
    seen: set[int] = set()
    for model in models:
        for name, parameter in model.named_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                shard = shard_of(parameter)
                found.setdefault(name if shard is None else shard.name, []).append((parameter, shard))
    return found


def share_parameters(first: nn.Module, second: nn.Module) -> None:
    """Makes one weight of those that two stages on the same rank both hold."""
    own = dict(first.named_parameters(remove_duplicate=False))
    for name, _ in list(second.named_parameters(remove_duplicate=False)):
        if name in own:
            owner, _, key = name.rpartition(".")
            setattr(second.get_submodule(owner), key, own[name])


def shared_parameters(
    models: Sequence[nn.Module], parameter_ranks: dict[str, tuple[int, ...]], world: World
) -> Iterator[tuple[nn.Parameter, Any]]:
    """This rank's parameters that other ranks of the pipeline hold as well, each with the group in which its gradients
    are summed.

    Every rank of the world must walk through it: all make every group, in the same order.

    Args:
        models: of this rank's stages. parameter_ranks: ranks of the pipeline that hold each weight.
    """
    pieces = local_parameters(models)
    for ranks, names in groupby(
        sorted(parameter_ranks, key=lambda name: (parameter_ranks[name], name)), parameter_ranks.__getitem__
    ):
        if len(ranks) == 1:
            continue
        group = world.groups.pipeline_subgroup(ranks)
        for name in names if world.topology.stage in ranks else ():
            yield from ((parameter, group) for parameter, _ in pieces[name] if parameter.requires_grad)
