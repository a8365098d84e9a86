"""How many query heads share a key/value head, on a rank that shares key/value heads with others."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from trainer.sharding.remote import local_and_remote_parameters
from trainer.sharding.shard import shard_of


def correct_key_value_groups(model: nn.Module, heads: Mapping[str, int], ranks: int) -> None:
    """Makes `num_key_value_groups` of each attention module the number for this rank's heads.

    Sharding leaves that number as it is, unless a key/value head is held by several ranks, among which its query heads
    are divided. A layer that lacks key/value weights and uses those of another layer is corrected like that one.

    Args:
        heads: key/value heads of each weight whose heads are held by several ranks, by the weight's name.
    """
    attentions = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "num_key_value_groups", None), int)
    }
    corrected: dict[nn.Module, int] = {}
    by_kind: dict[tuple[type[nn.Module], int], tuple[str, int]] = {}
    for name, parameter in local_and_remote_parameters(model):
        shard = shard_of(parameter)
        above = [name[:end] for end in range(len(name)) if name[end] == "." and name[:end] in attentions]
        if above and shard is not None and shard.name in heads:
            attention = attentions[above[-1]]
            groups: int = attention.num_key_value_groups
            corrected[attention] = max(1, groups * heads[shard.name] // ranks)
            by_kind[type(attention), groups] = name.removeprefix(f"{above[-1]}."), corrected[attention]
    for attention in attentions.values():
        key, number = by_kind.get((type(attention), attention.num_key_value_groups), ("", 0))
        borrows = number and key not in dict(local_and_remote_parameters(attention))
        if attention in corrected or borrows:
            attention.num_key_value_groups = corrected.get(attention, number)
