"""Writes the trained model as a Hugging Face folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """For each name of a weight that stands for another one (a tied head), the name it is stored under."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
    return tied


def write_model(
    model: PreTrainedModel,
    weights: Iterable[tuple[str, Tensor]],
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    writes: bool = True,
) -> None:
    """Writes `folder` whole or not at all: config, safetensors, and the tokenizer if there is one.

    Args:
        model: gives structure and configuration; its own parameters are not read.
        weights: every parameter by its Hugging Face name, whole; walking through it may take all ranks.
        writes: whether this rank writes, or only walks along.
    """
    state = {}
    for name, tensor in weights:
        if writes:
            state[name] = tensor.detach().to("cpu", copy=True)
    if not writes:
        return
    state |= {alias: state[name] for alias, name in tied_names(model).items()}
    persistent = model.state_dict(keep_vars=True)
    state |= {name: tensor.detach().cpu() for name, tensor in persistent.items() if name not in state}
    transformers_logging.disable_progress_bar()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    dtype = next(iter(state.values())).dtype
    cached, model.config.use_cache = model.config.use_cache, True
    model.config.dtype = dtype
    try:
        model.save_pretrained(str(partial), state_dict=state)
    finally:
        model.config.use_cache = cached
    if tokenizer is not None:
        tokenizer.save_pretrained(str(partial))
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


def load_exported(folder: Path) -> PreTrainedModel:
    """The model in a folder that `write_model` wrote, ready to generate."""
    from transformers import AutoModelForCausalLM

    transformers_logging.disable_progress_bar()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(folder), use_safetensors=True, trust_remote_code=False
    )
    model.eval()
    return model
