"""Implementation of a mixture's experts: the grouped matrix product, or one expert at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache

import torch
from torch import nn
from transformers import PreTrainedModel

from trainer.errors import PlanError, Problem
from trainer.sharding import shard_of

log = logging.getLogger(__name__)

_GROUPED, _ONE_BY_ONE = "grouped_mm", "eager"
"""Names of transformers' implementations."""

_ALIGNMENT = 16
"""Bytes of which every stride must be a multiple in the grouped matrix product."""


def choose_experts_implementation(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Compute the experts one at a time if the widths on this rank do not suit the grouped matrix product.

    Args:
        model: its parameters are full, or have their shard's record; they may be on the meta device.
        dtype: of the computation.

    Raises:
        PlanError: if the family has no other implementation.
    """
    misaligned = next(_misaligned(model, dtype), None)
    if misaligned is None:
        return
    name, width = misaligned
    size, multiple = dtype.itemsize, _ALIGNMENT // dtype.itemsize
    reason = (
        f"{name} has a width of {width} on a rank, {width * size} bytes in {str(dtype).removeprefix('torch.')}, and "
        f"the grouped matrix product needs a multiple of {_ALIGNMENT} bytes"
    )
    model.set_experts_implementation(_ONE_BY_ONE)
    if next(_misaligned(model, dtype), None) is not None:
        remedy = f"Use a size for which the width is a multiple of {multiple}"
        raise PlanError(Problem("parallel.tensor", reason, remedy))
    _log_once(f"computing experts one at a time: {reason}; a multiple of {multiple} elements is faster")


def _misaligned(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, int]]:
    """Yield weights of experts that the grouped matrix product cannot take: (name, width on this rank)."""
    for owner, module in model.named_modules():
        config = getattr(module, "config", None)
        if not hasattr(module, "is_transposed") or getattr(config, "_experts_implementation", None) != _GROUPED:
            continue
        for key, parameter in module.named_parameters(recurse=False):
            shard = shard_of(parameter)
            shape = tuple(parameter.shape) if shard is None else shard.local_shape()
            widths = shape[1:] if len(shape) == 3 else ()
            yield from ((f"{owner}.{key}", width) for width in widths if width * dtype.itemsize % _ALIGNMENT)


@cache
def _log_once(text: str) -> None:
    """Log a line once, even if several parts of a model are made on this rank."""
    log.info(text)
