"""Selective activation checkpointing: attention alone is computed again in the backward pass.

Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 5, which
computes the scores again; here the whole module is, its projections included, so that it works for every family.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainer.sharding import is_remote


def recompute(model: nn.Module, names: Iterable[str]) -> None:
    """Lets modules keep no activations but their inputs while they are trained; those of other stages compute none."""
    for name in names:
        module = model.get_submodule(name)
        if not is_remote(module):
            module.forward = _recomputed(module)


def _recomputed(module: nn.Module) -> Any:
    forward = module.forward

    @functools.wraps(forward)
    def again(*args: Any, **kwargs: Any) -> Any:
        if not (module.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return again
