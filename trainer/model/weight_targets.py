"""Which tensors in weight files make up which tensors of a model."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from trainer.compat.transformers.conversion import KeyMatcher, WeightConverter, is_stacking
from trainer.errors import ConfigError, Problem
from trainer.model.weight_files import TensorView, WeightFiles
from trainer.sharding import local_and_remote_parameters

Offset = tuple[int, ...]
"""Position of a block in a full tensor: its first index in each dimension."""


@dataclass
class Target:
    """A tensor of the model, and the tensors in the files that it is made of."""

    name: str
    sources: list[tuple[str, str]] = field(default_factory=list)
    """(key in the files, pattern of the converter that it matches, or "")."""

    converter: WeightConverter | None = None

    def source_offsets(self, files: WeightFiles) -> dict[str, Offset] | None:
        """Return where each source lies in the target; None if the target is more than its sources put together.

        A stack of experts [E, 2I, H] has sources of two patterns (gate and up), one of each for every expert.
        """
        if self.converter is None:
            key = self.sources[0][0]
            return {key: (0,) * len(files.view(key).get_shape())}
        if not is_stacking(self.converter):
            return None
        patterns = list(self.converter.source_patterns)
        counts, row_offsets = dict.fromkeys(patterns, 0), dict.fromkeys(patterns, 0)
        for previous, pattern in itertools.pairwise(patterns):
            example = next(key for key, matched in self.sources if matched == previous)
            row_offsets[pattern] = row_offsets[previous] + files.view(example).get_shape()[0]
        offsets: dict[str, Offset] = {}
        for key, pattern in self.sources:
            rest = len(files.view(key).get_shape()) - 1
            offsets[key] = (counts[pattern], row_offsets[pattern], *(0,) * rest)
            counts[pattern] += 1
        return offsets


def find_targets(model: PreTrainedModel, files: WeightFiles) -> tuple[dict[str, Target], list[str]]:
    """Return the tensors of a model that the files hold, by name, and the keys that match none.

    Records on the model how names were converted, so that a later export converts them back.
    """
    tensors = model.state_dict() | dict(local_and_remote_parameters(model))
    matcher = KeyMatcher(model, tensors, has_file_names=files.has_published_names)
    targets: dict[str, Target] = {}
    unmatched = []
    for key in files.names():
        match = matcher.match(key)
        if match is None:
            unmatched.append(key)
            continue
        target = targets.setdefault(match.name, Target(match.name))
        target.sources.append((key, match.pattern))
        target.converter = match.converter
    if files.has_published_names:
        matcher.record_on(model)
    return targets, unmatched


def unmatched_keys(model: PreTrainedModel, keys: list[str]) -> list[str]:
    """Return the keys that belong to no parameter and to no buffer of the model, persistent or not."""
    tensors = model.state_dict() | dict(local_and_remote_parameters(model)) | dict(model.named_buffers())
    matcher = KeyMatcher(model, tensors)
    return [key for key in keys if matcher.match(key) is None]


def refuse_differing_tied_weights(
    model: PreTrainedModel, path: str, targets: dict[str, Target], files: WeightFiles
) -> None:
    """Compare weights that the files hold under several names and that the model ties.

    transformers unties such weights. Here one of them would be lost, and a different one on each pipeline stage.

    Raises:
        ConfigError: if two values differ, with both keys.
    """
    keys_of_parameter: dict[int, list[str]] = {}
    for name, parameter in local_and_remote_parameters(model):
        if name in targets and targets[name].converter is None:
            keys_of_parameter.setdefault(id(parameter), []).append(targets[name].sources[0][0])
    for first, *others in keys_of_parameter.values():
        for other in others:
            if not _are_equal(files.view(first), files.view(other)):
                raise ConfigError(
                    Problem(
                        "model.path",
                        f"'{first}' and '{other}' in '{path}' have different values, and the configuration ties them",
                        f"Set tie_word_embeddings to false in {path}/config.json, or delete the one that is not meant",
                    )
                )


_COMPARED_ROWS = 4096


def _are_equal(left: TensorView, right: TensorView) -> bool:
    """Compare two stored tensors, with a few rows at a time in memory."""
    shape = tuple(left.get_shape())
    if shape != tuple(right.get_shape()):
        return False
    if not shape:
        return torch.equal(left[()].float(), right[()].float())
    rest = tuple(slice(None) for _ in shape[1:])
    starts = range(0, shape[0], _COMPARED_ROWS)
    blocks = [(slice(start, start + _COMPARED_ROWS), *rest) for start in starts]
    return all(torch.equal(left[block].float(), right[block].float()) for block in blocks)
