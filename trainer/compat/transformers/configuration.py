"""Internals of transformers' configuration classes and of model classes that state what they support."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def build_config(config_class: type[PreTrainedConfig], raw: Mapping[str, Any]) -> PreTrainedConfig:
    """Build a configuration from the content of a config.json, which encodes infinity, absent from JSON, as objects."""
    return config_class.from_dict(config_class._decode_special_floats(dict(raw)))


def supports_sdpa(model_class: Any) -> bool:
    """Return whether a model class supports PyTorch's scaled dot-product attention."""
    return bool(model_class._supports_sdpa)
