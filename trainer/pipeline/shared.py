"""Weights that several stages hold: tied embeddings, and whatever else layers far apart have in common."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from torch import nn

from trainer.distributed import World
from trainer.parallel import Shard, shard_of


def pieces_of(model: nn.Module) -> dict[str, list[tuple[nn.Parameter, Shard | None]]]:
    """What this rank holds of each weight, by the weight's first name."""
    found: dict[str, list[tuple[nn.Parameter, Shard | None]]] = {}
    for name, parameter in model.named_parameters():
        shard = shard_of(parameter)
        found.setdefault(name if shard is None else shard.name, []).append((parameter, shard))
    return found


def shared_weights(
    model: nn.Module, held_by: dict[str, tuple[int, ...]], world: World
) -> Iterator[tuple[nn.Parameter, Any]]:
    """This rank's parameters that other stages hold as well, each with the group in which its gradients are summed.

    Every rank of the world must walk through it: all make every group, in the same order.
    """
    pieces = pieces_of(model)
    for stages, names in groupby(sorted(held_by, key=lambda name: (held_by[name], name)), held_by.__getitem__):
        if len(stages) == 1:
            continue
        group = world.stages_group(stages)
        for name in names if world.topology.stage in stages else ():
            yield from ((parameter, group) for parameter, _ in pieces[name] if parameter.requires_grad)
