"""Parameters that several stages hold: tied embeddings, and others that distant layers share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from torch import nn

from trainer.distributed import World
from trainer.sharding import Shard, shard_of

LocalParameters = dict[str, list[tuple[nn.Parameter, Shard | None]]]
"""Parameters of a rank with their shard records, by the first name of the weight."""


def local_parameters(models: Sequence[nn.Module]) -> LocalParameters:
    """Return the parameters of this rank's stages; one that two stages share is listed once."""
    result: LocalParameters = {}
    seen: set[int] = set()
    for model in models:
        for name, parameter in model.named_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                shard = shard_of(parameter)
                result.setdefault(name if shard is None else shard.name, []).append((parameter, shard))
    return result


def share_parameters(first: nn.Module, second: nn.Module) -> None:
    """Replace the parameters of the second stage of a rank by those of the first stage that have the same name."""
    parameters = dict(first.named_parameters(remove_duplicate=False))
    for name, _ in list(second.named_parameters(remove_duplicate=False)):
        if name in parameters:
            owner, _, key = name.rpartition(".")
            setattr(second.get_submodule(owner), key, parameters[name])


def shared_parameters(
    models: Sequence[nn.Module], parameter_ranks: dict[str, tuple[int, ...]], world: World
) -> Iterator[tuple[nn.Parameter, Any]]:
    """Yield the parameters that other pipeline ranks hold as well, with the group that sums their gradients.

    Collective: all ranks of the world must exhaust it, because all create every group, in the same order.

    Args:
        models: of this rank's stages.
        parameter_ranks: pipeline ranks that hold each weight.
        world: of this rank.
    """
    pieces = local_parameters(models)
    for ranks, names in groupby(
        sorted(parameter_ranks, key=lambda name: (parameter_ranks[name], name)), parameter_ranks.__getitem__
    ):
        if len(ranks) == 1:
            continue
        group = world.groups.pipeline_subgroup(ranks)
        for name in names if world.topology.pipeline_rank in ranks else ():
            yield from ((parameter, group) for parameter, _ in pieces[name] if parameter.requires_grad)
