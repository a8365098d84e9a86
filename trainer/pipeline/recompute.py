"""Activation checkpointing: `full` recomputes layers in the backward pass, `selective` attention only.

Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 5, which
recomputes the scores; here the full attention module is recomputed, its projections included, which works for every
family.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from trainer.errors import PlanError, Problem
from trainer.pipeline.trace import trace_training_and_evaluation
from trainer.sharding import is_remote

if TYPE_CHECKING:
    from trainer.config import LoadedConfig

P = ParamSpec("P")
R = TypeVar("R")


def attention_to_recompute(model: PreTrainedModel, loaded: LoadedConfig) -> tuple[str, ...]:
    """Return the attention modules of a model on the meta device if they are to be recomputed, else nothing.

    Raises:
        PlanError: if there are none.
    """
    if loaded.config.model.activation_checkpointing != "selective":
        return ()
    training, evaluation = trace_training_and_evaluation(model, loaded.config.model.task)
    names = training.attention_modules(evaluation)
    if not names:
        family = model.config.model_type
        reason = f"'selective' recomputes attention, and {family} has no attention modules in its layers"
        raise PlanError(Problem("model.activation_checkpointing", reason, "Set it to 'full' or 'none'"))
    return tuple(names)


def install_recomputation(model: PreTrainedModel, loaded: LoadedConfig, attention: Iterable[str]) -> None:
    """Make a model drop activations in the forward pass and recompute them in the backward pass, as configured.

    Args:
        model: with its modules in their final form.
        loaded: the configuration.
        attention: from `attention_to_recompute`. Modules of other pipeline stages compute nothing, and are left as
            they are.
    """
    if loaded.config.model.activation_checkpointing == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for name in attention:
        module = model.get_submodule(name)
        if not is_remote(module):
            module.forward = _recomputing(module, module.forward)


def _recomputing(module: nn.Module, forward: Callable[P, R]) -> Callable[P, R]:
    """Wrap the forward pass of a module so that training keeps its inputs only."""

    @functools.wraps(forward)
    def recomputed(*args: P.args, **kwargs: P.kwargs) -> R:
        if not (module.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        result: R = checkpoint(forward, *args, use_reentrant=False, **kwargs)  # type: ignore[arg-type]
        return result

    return recomputed
