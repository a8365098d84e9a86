"""Values of `model.task`, with the families that each can train. `trainer.tasks` implements them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskFamilies:
    """The families of transformers that have a model for a task."""

    mapping: str
    """Name of transformers' mapping from a family's configuration class to its model class."""

    noun: str
    """Noun for the models, for messages."""

    remedy: str
    """Remedy for a family without such a model, for messages."""

    is_causal: bool
    """Whether attention must not see later tokens."""


TASK_FAMILIES: dict[str, TaskFamilies] = {
    "causal_lm": TaskFamilies("MODEL_FOR_CAUSAL_LM_MAPPING", "causal language model", "Take a decoder", is_causal=True),
}
"""Accepted values of `model.task`."""

DEFAULT_TASK = "causal_lm"
