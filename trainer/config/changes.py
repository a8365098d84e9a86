"""Configuration values that differ between two attempts of one run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

_PER_ATTEMPT = ("checkpoint.resume", "checkpoint.allow_changed")
"""Keys that say how one attempt starts."""

_SHOWN = 60
"""Characters of a value."""


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """One line for each value that differs, `KEY: OLD -> NEW`, sorted by key.

    Args:
        old, new: resolved configurations, in the keys of this version.
    """
    before, after = leaves(old), leaves(new)
    for key in sorted(before.keys() | after.keys()):
        if key not in _PER_ATTEMPT and before.get(key) != after.get(key):
            yield f"{key}: {_shown(before, key)} -> {_shown(after, key)}"


def leaves(value: Any, key: str = "") -> dict[str, Any]:
    """The values below `value` that are no objects, by dotted key."""
    if isinstance(value, Mapping) and (value or not key):
        return {
            k: v for name, below in value.items() for k, v in leaves(below, f"{key}.{name}" if key else name).items()
        }
    return {key: value}


def _shown(values: Mapping[str, Any], key: str) -> str:
    text = json.dumps(values[key]) if key in values else "unset"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
