"""Number of query heads per key/value head, on a rank that shares key/value heads with other ranks."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from trainer.sharding import local_and_remote_parameters, shard_of


def correct_key_value_groups(model: nn.Module, heads: Mapping[str, int], ranks: int) -> None:
    """Set `num_key_value_groups` of each attention module to the number for this rank's heads.

    Sharding does not change that number, unless several ranks hold a key/value head and divide its query heads. A layer
    that lacks key/value weights and uses those of another layer is corrected like that one.

    Args:
        model: sharded, with the records of its shards.
        heads: key/value heads of each weight whose heads several ranks hold, by the weight's name.
        ranks: number of tensor ranks.
    """
    attentions = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "num_key_value_groups", None), int)
    }
    corrected: dict[nn.Module, int] = {}
    by_class: dict[tuple[type[nn.Module], int], tuple[str, int]] = {}
    """By class and number of groups: the key of a key/value weight, and the corrected number."""

    for name, parameter in local_and_remote_parameters(model):
        shard = shard_of(parameter)
        above = [name[:end] for end in range(len(name)) if name[end] == "." and name[:end] in attentions]
        if above and shard is not None and shard.name in heads:
            attention = attentions[above[-1]]
            groups: int = attention.num_key_value_groups
            corrected[attention] = max(1, groups * heads[shard.name] // ranks)
            by_class[type(attention), groups] = name.removeprefix(f"{above[-1]}."), corrected[attention]
    for attention in attentions.values():
        key, groups = by_class.get((type(attention), attention.num_key_value_groups), ("", 0))
        borrows = groups and key not in dict(local_and_remote_parameters(attention))
        if attention in corrected or borrows:
            attention.num_key_value_groups = corrected.get(attention, groups)
