"""Configuration values that differ between two attempts of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

_PER_ATTEMPT = ("checkpoint.resume", "checkpoint.allow_changed")
"""Keys that describe how one attempt starts."""

_MAX_SHOWN = 60
"""Characters of a value."""


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each value that differs, `KEY: OLD -> NEW`, sorted by key.

    Args:
        old: The resolved configuration of the earlier attempt, in the keys of this version.
        new: That of this attempt.
    """
    before, after = leaves(old), leaves(new)
    for key in sorted(before.keys() | after.keys()):
        if key not in _PER_ATTEMPT and before.get(key) != after.get(key):
            yield f"{key}: {_shown(before, key)} -> {_shown(after, key)}"


def leaves(value: object, key: str = "") -> dict[str, Any]:
    """Return the values below an object that are not objects themselves, by dotted key.

    Args:
        value: A JSON value.
        key: Dotted key of `value`.
    """
    if isinstance(value, Mapping) and (value or not key):
        nested = (leaves(item, f"{key}.{name}" if key else name) for name, item in value.items())
        return {name: leaf for below in nested for name, leaf in below.items()}
    return {key: value}


def _shown(values: Mapping[str, Any], key: str) -> str:
    text = json.dumps(values[key]) if key in values else "unset"
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."
