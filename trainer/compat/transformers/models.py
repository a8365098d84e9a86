"""Internal attributes of transformers' models."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from trainer.compat.dependency_check import check_names
from trainer.compat.transformers.names import MODEL, TRANSFORMERS

check_names(TRANSFORMERS, MODEL)


def attention_implementation(config: PreTrainedConfig) -> str:
    """Return the name of the attention implementation in use."""
    return str(config._attn_implementation)


def head_plan(model: nn.Module) -> dict[str, str]:
    """Return the styles that transformers' tensor-parallel plan gives to modules of a class with a head."""
    return dict(getattr(model, "_tp_plan", None) or {})


def names_not_saved(model: PreTrainedModel) -> set[str]:
    """Return the names of tensors that the family leaves out of its files."""
    return set(model._keys_to_ignore_on_save or ())


def patterns_of_computed(model: PreTrainedModel) -> list[str]:
    """Return regular expressions of parameters that may be missing in files, because the family computes them."""
    return list(model._keys_to_ignore_on_load_missing or ())


def patterns_of_skipped(model: PreTrainedModel) -> list[str]:
    """Return regular expressions of keys in files that the family skips."""
    return sorted(model._keys_to_ignore_on_load_unexpected or ())
