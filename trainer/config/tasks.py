"""Values of `model.task`, with the families that each can train. `trainer.tasks` implements them."""

from __future__ import annotations

from collections.abc import Mapping
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
    """Whether the loss at a position must not depend on later inputs, which is probed before the first step."""

    @property
    def class_names(self) -> Mapping[str, str]:
        """Name of the model class by model type, as transformers maps them."""
        from transformers.models.auto import modeling_auto

        names: Mapping[str, str] = getattr(modeling_auto, f"{self.mapping}_NAMES")
        return names


TASK_FAMILIES: dict[str, TaskFamilies] = {
    "causal_lm": TaskFamilies("MODEL_FOR_CAUSAL_LM_MAPPING", "causal language model", "Take a decoder", is_causal=True),
}
"""Accepted values of `model.task`."""

DEFAULT_TASK = "causal_lm"
