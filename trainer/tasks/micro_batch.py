"""Micro-batches: the named tensors of one forward pass, and its labels."""

from __future__ import annotations

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
    Padded labels are ignored, so no loss changes.
    """
    columns = [{**micro.inputs, "labels": micro.labels} for micro in micro_batches]
    shapes = {
        name: [max(sizes) for sizes in zip(*(tensors[name].shape for tensors in columns), strict=True)]
        for name in columns[0]
    }

    def pad(name: str, tensor: Tensor) -> Tensor:
        value = IGNORE_INDEX if name == "labels" else int(name.endswith("mask"))
        missing = [(0, full - size) for full, size in zip(shapes[name], tensor.shape, strict=True)]
        return F.pad(tensor, [bound for pair in reversed(missing) for bound in pair], value=value)

    padded = [
        MicroBatch(
            {name: pad(name, tensor) for name, tensor in micro.inputs.items()},
            pad("labels", micro.labels),
            micro.num_targets,
        )
        for micro in micro_batches
    ]
    return (*padded, *[padded[0].without_targets()] * (min_count - len(padded)))
