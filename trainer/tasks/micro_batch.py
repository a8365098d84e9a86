"""Micro-batches: the named tensors of one forward pass, and its labels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100
"""Label of a position that predicts nothing (the convention of torch and Hugging Face)."""


def count_targets(labels: Tensor) -> int:
    """Count the labels (of any shape) that are not `IGNORE_INDEX`."""
    return int((labels != IGNORE_INDEX).sum())


@dataclass(frozen=True)
class MicroBatch:
    """B samples, collated by a task."""

    inputs: Mapping[str, Tensor]
    """Keyword arguments of the model's forward pass. The first dimension of each is B."""

    labels: Tensor
    """(B, ...); `IGNORE_INDEX` where nothing is predicted."""

    num_targets: int
    """Predictions that the loss is averaged over."""

    def to(self, device: torch.device) -> MicroBatch:
        """Copy the tensors to `device`, without waiting where their memory is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> MicroBatch:
        """Copy the tensors into pinned host memory."""
        return self._map(Tensor.pin_memory)

    def without_targets(self) -> MicroBatch:
        """Return the same inputs with all labels ignored."""
        return replace(self, labels=torch.full_like(self.labels, IGNORE_INDEX), num_targets=0)

    def _map(self, function: Callable[[Tensor], Tensor]) -> MicroBatch:
        inputs = {name: function(tensor) for name, tensor in self.inputs.items()}
        return MicroBatch(inputs, function(self.labels), self.num_targets)


def pad_to_common_shape(micro_batches: Sequence[MicroBatch], min_count: int = 0) -> tuple[MicroBatch, ...]:
    """Pad micro-batches to one shape, and append ones without targets until there are `min_count`.

    Padding is 0 in inputs, except in masks, where it is 1: a row that masks every position has no defined attention.
    Padded labels are ignored, so no loss changes. A micro-batch may lack an input that other micro-batches have, such
    as a mask.
    """
    shapes: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for micro in micro_batches:
        for name, tensor in _tensors(micro).items():
            shapes[_shape_key(micro, name)].append(tuple(tensor.shape))
    common = {key: [max(sizes) for sizes in zip(*key_shapes, strict=True)] for key, key_shapes in shapes.items()}

    def pad(micro: MicroBatch) -> MicroBatch:
        padded = {}
        for name, tensor in _tensors(micro).items():
            value = IGNORE_INDEX if name == _LABELS else int(name.endswith("mask"))
            missing = [
                (0, full - size) for full, size in zip(common[_shape_key(micro, name)], tensor.shape, strict=True)
            ]
            padded[name] = F.pad(tensor, [bound for pair in reversed(missing) for bound in pair], value=value)
        labels = padded.pop(_LABELS)
        return MicroBatch(padded, labels, micro.num_targets)

    result = [pad(micro) for micro in micro_batches]
    return (*result, *[result[0].without_targets()] * (min_count - len(result)))


_LABELS = "labels"


def _tensors(micro: MicroBatch) -> dict[str, Tensor]:
    return {**micro.inputs, _LABELS: micro.labels}


def _shape_key(micro: MicroBatch, name: str) -> str:
    """Return the name of the first tensor that has the shape of `name`: those of one shape are padded alike."""
    tensors = _tensors(micro)
    return next(key for key, tensor in tensors.items() if tensor.shape == tensors[name].shape)
