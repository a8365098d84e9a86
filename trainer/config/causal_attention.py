"""Families whose attention is causal by a setting, always, or never."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainer.config.tasks import TASK_FAMILIES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from trainer.config.schema import ModelSection

NON_CAUSAL_FAMILIES: Mapping[str, str] = {
    "cpmant": "treats all tokens of a sample as context, which is seen in both directions",
    "prophetnet": "mixes positions in its n-gram attention, by a reshape",
    "xlnet": "attends in both directions without a permutation",
}
"""Families whose causal class attends to later tokens with every configuration, with the reason.

The causality probe detects most of them only after some training; `tools/parity` proves that there are no others.
"""

_SWITCHES = ("is_decoder", "causal")
"""Keys that make the attention of an encoder family causal if true: BERT and relatives, XLM. Their default is false."""


def causal_switch(model_type: object) -> str | None:
    """Return the configuration key that makes a family's attention causal if true; None for a family without one."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return None
    config_class: Any = CONFIG_MAPPING[model_type]
    fields = {field.name for field in dataclasses.fields(config_class)}
    return next((key for key in _SWITCHES if key in fields), None)


def make_causal(config: PreTrainedConfig) -> PreTrainedConfig:
    """Turn on a family's switch for causal attention in its configuration, in place.

    Families without a `causal_switch` are always or never causal, and are not changed.
    """
    if switch := causal_switch(config.model_type):
        setattr(config, switch, True)
    return config


def with_causal_attention(section: ModelSection) -> ModelSection:
    """Return the section with the family's `causal_switch` turned on in `config`, unless `config` sets it.

    A folder at `path` is not changed: its weights were trained with the attention that its config.json names.
    """
    raw = section.config if TASK_FAMILIES[section.task].is_causal else None
    switch = None if raw is None else causal_switch(raw.get("model_type"))
    if raw is None or switch is None or switch in raw:
        return section
    return section.model_copy(update={"config": {**raw, switch: True}})


def causal_setting(config: PreTrainedConfig) -> tuple[str, Any] | None:
    """Return the key of a configuration that prevents causal attention, with the value to set; None if none does."""
    switch = causal_switch(config.model_type)
    if switch and not getattr(config, switch):
        return switch, True
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return "use_bidirectional_attention", False
    if getattr(config, "attention_type", None) == "block_sparse":
        return "attention_type", "original_full"
    # LSH attention sorts positions into chunks by their hash, so that later tokens change the chunks of earlier ones.
    if "lsh" in (layers := getattr(config, "attn_layers", None) or ()):
        return "attn_layers", ["local"] * len(layers)
    return None
