"""Builds Hugging Face models on the meta device, and checks the requirements of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from trainer.checkpoint_format import is_checkpoint
from trainer.config.model_config import load_model_config, model_config, parse_model_config
from trainer.config.schema import ModelSection
from trainer.config.tasks import DEFAULT_TASK
from trainer.errors import ConfigError, Problem, first_line
from trainer.model.parameter_options import weight_options
from trainer.model.read import check_weight_headers, read_weights
from trainer.tasks import TASKS
from trainer.tensor_parallel import (
    choose_experts_implementation,
    has_active_dropout,
    refuse_sequence_parallel,
    resolve_plan,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.config import LoadedConfig


def build_model(loaded: LoadedConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedModel:
    """Build the configured model in fp32 with every tensor on the meta device; `materialize` gives it values.

    Args:
        loaded: the configuration.
        tokenizer: tokenizer whose special tokens an inline model uses if it sets none.

    Raises:
        ConfigError: if transformers refuses to build it: an attention implementation that the model or the machine
            lacks, sizes that do not fit together, no support for activation checkpointing.
    """
    section = loaded.config.model
    config = model_config(section)
    if section.config is not None and tokenizer is not None:
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if key not in section.config:
                setattr(config, key, getattr(tokenizer, key))
    return _construct(config, section.task, section, attn_implementation=loaded.attention)


def check_model(model: PreTrainedModel, loaded: LoadedConfig) -> None:
    """Check that the weights, the parameter groups and the tensor plan fit a model on the meta device.

    Raises:
        ConfigError: if a pattern of a parameter group matches no weight; if the weights in the folder at `model.path`
            are quantized, or have unexpected keys.
        PlanError: if the tensor plan and the model do not fit together.
    """
    section, parallel = loaded.config.model, loaded.config.parallel
    if section.path is not None and loaded.initialize == "pretrained":
        check_weight_headers(model, section.path, allow_unexpected_keys=section.allow_unexpected_keys)
    weight_options(model, loaded.config.training, decay=0)
    if parallel.tensor > 1 or parallel.tensor_plan:
        plan = resolve_plan(model, parallel.tensor_plan, parallel.tensor, rank=0)
        if parallel.sequence_parallel:
            refuse_sequence_parallel(model, plan, has_active_dropout=has_active_dropout(model))


def build_from_description(description: Mapping[str, Any], task: str = DEFAULT_TASK) -> PreTrainedModel:
    """Build a model on the meta device from what `describe_model` returns.

    Args:
        description: of the model.
        task: `model.task`.

    Raises:
        ConfigError: if transformers refuses it.
    """
    config = parse_model_config(description["config"], "the checkpoint", task)
    model = _construct(config, task)
    if description["generation"]:
        model.generation_config = GenerationConfig.from_dict(dict(description["generation"]))
    return model


def load_model(path: str, key: str = "model.path") -> PreTrainedModel:
    """Load the model at `path` with its weights on the CPU, ready to generate.

    Its dtype is that of the weights in a folder or on the hub, and fp32 for a checkpoint.

    Args:
        path: a checkpoint, a Hugging Face folder, or a name on the hub.
        key: the option that named the path, for messages.

    Raises:
        ConfigError: as for a `model.path` of the configuration.
    """
    try:
        config = load_model_config(path, weights_are_read=True)
        config.use_cache = True
        stored = torch.float32 if is_checkpoint(Path(path).expanduser()) else config.dtype
        dtype = stored if isinstance(stored, torch.dtype) else torch.float32
        model = _construct(config, DEFAULT_TASK, dtype=dtype)
        read_weights(model, path)
    except ConfigError as error:
        named = (replace(problem, path=problem.path.replace("model.path", key)) for problem in error.problems)
        raise ConfigError(named) from None
    choose_experts_implementation(model, model.dtype)
    model.eval()
    return model


def _construct(
    config: PreTrainedConfig,
    task: str,
    section: ModelSection | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    **arguments: str,
) -> PreTrainedModel:
    """Construct a model on the meta device.

    Args:
        config: of transformers.
        task: whose auto class constructs it.
        section: the user's settings, which messages name; None for a model that is only read.
        dtype: of the parameters.
        arguments: further ones of the auto class.

    Raises:
        ConfigError: if transformers refuses it.
    """
    section = section or ModelSection(config={})
    try:
        with torch.device("meta"):
            model: PreTrainedModel = TASKS[task].auto_class.from_config(
                config, dtype=dtype, trust_remote_code=False, **arguments
            )
    except Exception as error:  # the families' constructors raise many types, or fail in arithmetic
        raise ConfigError(_construction_problem(section, error)) from None
    if section.activation_checkpointing == "full" and not model.supports_gradient_checkpointing:
        raise ConfigError(
            Problem(
                "model.activation_checkpointing",
                f"'{config.model_type}' does not support it in transformers",
                "Set it to 'none'",
            )
        )
    return model


def _construction_problem(section: ModelSection, error: Exception) -> Problem:
    cause = first_line(error)
    is_missing_package = section.attention is not None and isinstance(error, ImportError)
    if "attn" in cause.lower() or "attention" in cause.lower() or is_missing_package:
        reason = cause.split(". Please request")[0]
        remedy = "Set 'eager'" if section.attention == "sdpa" else "Set 'sdpa' or 'eager'"
        return Problem("model.attention", f"'{section.attention}' cannot be used: {reason}", remedy)
    return Problem("model", f"transformers refuses it: {cause}")
