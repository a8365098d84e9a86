"""Builds the Hugging Face model: on the meta device when its weights are made here, whole when they are read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from trainer.config.model_facts import model_config
from trainer.errors import ConfigError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.config import LoadedConfig
    from trainer.config.schema import ModelSection

log = logging.getLogger(__name__)


def build_model_shape(loaded: LoadedConfig) -> PreTrainedModel:
    """The model with every tensor on the meta device: shapes and names, no memory.

    Raises:
        ConfigError: if transformers refuses to build it: an attention implementation that the model or the machine
            lacks, sizes that do not fit together, no support for activation checkpointing.
    """
    section = loaded.config.model
    return _on_meta(section, model_config(section), {"attn_implementation": loaded.attention, "dtype": torch.float32})


def build_model(loaded: LoadedConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedModel:
    """The model of the configuration, in fp32.

    With `initialize: random` every tensor is on the meta device and `initialize_weights` gives it values.
    An inline model that names no special tokens takes those of `tokenizer`.

    Raises:
        ConfigError: as `build_model_shape`, or if the weights cannot be read or do not fit the model.
    """
    section = loaded.config.model
    config = model_config(section)
    if section.config is not None and tokenizer is not None:
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if key not in section.config:
                setattr(config, key, getattr(tokenizer, key))
    arguments: dict[str, Any] = {
        "attn_implementation": loaded.attention,
        "dtype": torch.float32,
    }
    if loaded.initialize == "pretrained":
        model = _read(section, config, arguments)
    else:
        model = _on_meta(section, config, arguments)
    if section.activation_checkpointing == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _on_meta(section: ModelSection, config: Any, arguments: dict[str, Any]) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **arguments)
    except Exception as error:  # the families' constructors check in their own ways, or fail by their arithmetic
        raise ConfigError(_refusal(section, error)) from None
    if section.activation_checkpointing == "full" and not model.supports_gradient_checkpointing:
        raise ConfigError(
            Problem(
                "model.activation_checkpointing",
                f"'{config.model_type}' does not support it in transformers",
                "Set it to 'none'",
            )
        )
    return model


def _refusal(section: ModelSection, error: Exception) -> Problem:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "attn" in first.lower() or "attention" in first.lower() or isinstance(error, ImportError):
        reason = first.split(". Please request")[0]
        remedy = "Set 'eager'" if section.attention == "sdpa" else "Set 'sdpa' or 'eager'"
        return Problem("model.attention", f"'{section.attention}' cannot be used: {reason}", remedy)
    return Problem("model", f"transformers refuses it: {first}")


def _read(section: ModelSection, config: Any, arguments: dict[str, Any]) -> PreTrainedModel:
    assert section.path is not None
    folder = Path(section.path).expanduser()
    log.info("reading weights from %s", section.path)
    try:
        read: Any = AutoModelForCausalLM.from_pretrained(
            str(folder) if folder.is_dir() else section.path,
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
            **arguments,
        )
    except Exception as error:  # hub, network, safetensors and shape errors alike
        raise ConfigError(_weights_refusal(section, error)) from None
    model: PreTrainedModel = read[0]
    info: dict[str, Any] = read[1]
    for kind in ("missing_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in info.get(kind, ())):
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ConfigError(
                Problem("model.path", f"weights in '{section.path}' do not fit the model: {kind.split('_')[0]} {shown}",
                        "Check that config.json and the weights belong together")
            )  # fmt: skip
    if unexpected := sorted(str(name) for name in info.get("unexpected_keys", ())):
        log.warning("%d weights of %s have no place in the model: %s", len(unexpected), section.path,
                    ", ".join(unexpected[:5]))  # fmt: skip
    return model


def _weights_refusal(section: ModelSection, error: Exception) -> Problem:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, ImportError):
        return _refusal(section, error)
    return Problem("model.path", f"'{section.path}' cannot be read: {first}", "Check the folder, the name, the network")
