"""Inputs for a forward pass without values."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel


def example_ids(model: PreTrainedModel, batch: int, length: int) -> dict[str, Tensor]:
    """Return token ids (batch, length) on the meta device, for both sides of an encoder-decoder."""
    ids = torch.zeros((batch, length), dtype=torch.long, device="meta")
    has_decoder = model.config.is_encoder_decoder and "decoder_input_ids" in inspect.signature(model.forward).parameters
    return {"input_ids": ids} | ({"decoder_input_ids": ids.clone()} if has_decoder else {})


def random_inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, Tensor]:
    """Return random token ids (batch, length) on the CPU, equal in every call, for both sides of an encoder-decoder."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    draw = torch.Generator().manual_seed(0)
    names = example_ids(model, batch, length)
    return {name: torch.randint(0, vocabulary, (batch, length), generator=draw) for name in names}
