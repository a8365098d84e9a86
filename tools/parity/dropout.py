"""Removal of dropout and of router noise, which two implementations of a model draw differently."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


def is_dropout_rate(key: str, value: object) -> bool:
    """Return whether a field of a configuration or module is a rate of dropout or of a router's noise."""
    return ("drop" in key or "jitter" in key) and isinstance(value, float)


def without_dropout(fields: Any, key: str = "") -> Any:
    """Return a model's configuration, as JSON holds it, with every rate at 0."""
    if isinstance(fields, dict):
        return {inner: without_dropout(value, inner) for inner, value in fields.items()}
    return 0.0 if is_dropout_rate(key, fields) else fields


def parts_of(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield a configuration and its sub-configurations."""
    yield config
    for name in getattr(config, "sub_configs", None) or {}:
        if (part := getattr(config, name, None)) is not None:
            yield part


def disable_config_dropout(config: PreTrainedConfig) -> list[str]:
    """Set every rate of a configuration to 0. Return the nonzero ones, as `name value`."""
    disabled = []
    for part in parts_of(config):
        for key, value in list(vars(part).items()):
            if is_dropout_rate(key, value):
                setattr(part, key, 0.0)
                disabled += [f"{key} {value:g}"] if value > 0 else []
    return list(dict.fromkeys(disabled))


def disable_dropout(model: PreTrainedModel) -> list[str]:
    """Set every rate of a model, in its configuration and its modules, to 0. Return those of the configuration."""
    for module in model.modules():
        for key, value in list(vars(module).items()):
            if is_dropout_rate(key, value) or (key == "p" and isinstance(module, nn.modules.dropout._DropoutNd)):  # noqa: SLF001
                setattr(module, key, 0.0)
    return disable_config_dropout(model.config)
