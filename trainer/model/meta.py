"""Preparation of a model for a forward pass on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from trainer.compat.transformers.models import attention_implementation


@contextmanager
def traceable(model: PreTrainedModel) -> Iterator[None]:
    """Replace attention kernels that only run on a GPU by eager attention, which has the same matrix products.

    Restores the implementation, and whether the model is in training mode.
    """
    is_training, attention = model.training, attention_implementation(model.config)
    try:
        if attention not in ("eager", "sdpa"):
            model.set_attn_implementation("eager")
        yield
    finally:
        model.train(is_training)
        if attention not in ("eager", "sdpa"):
            model.set_attn_implementation(attention)
