"""Tiny models of families on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from tools.parity.shrink import tiny


def meta_model(model_type: str, *, attention: str | None = None, **fields: Any) -> PreTrainedModel:
    """Return a family's tiny model: shapes, and no values.

    Args:
        model_type: The family.
        attention: Its attention implementation; None for the family's default.
        **fields: Of its configuration.
    """
    config = tiny(model_type, **fields)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model: PreTrainedModel = auto_class.from_config(config, attn_implementation=attention)
    return model
