"""Configuration keys that DeepSpeed has removed, with its own messages."""

from __future__ import annotations

from collections.abc import Mapping

from deepspeed.runtime import config

REMOVED_KEYS: Mapping[str, str] = getattr(config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {})
"""Message of each removed top-level key. Empty where DeepSpeed has no such table, which `load_config` refuses."""

REMOVED_ZERO_KEYS: Mapping[str, str] = getattr(config, "_REMOVED_ZERO_CONFIG_KEYS", {})
"""Message of each removed key of `zero_optimization`."""
