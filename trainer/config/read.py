"""Configuration files as plain JSON: `extends`, an external `deepspeed` file, and overrides of the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config import strict_json
from trainer.config.earlier_versions import METADATA_KEY, upgraded
from trainer.errors import ConfigError, Problem

Raw = dict[str, Any]


def merge(base: Raw, over: Mapping[str, Any]) -> Raw:
    """`over` on top of `base`: objects key by key, everything else (lists too) replaced."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def read_config_file(path: Path, seen: tuple[Path, ...] = ()) -> Raw:
    """The file `path` with its `extends` and an external `deepspeed` file merged in.

    Paths in both keys are relative to the file that names them.
    """
    path = path.expanduser().resolve()
    if path in seen:
        chain = " -> ".join(p.name for p in (*seen, path))
        raise ConfigError(Problem(str(path), f"extends itself: {chain}"))
    raw = strict_json.read(path)
    raw.pop("$schema", None)
    if raw.pop(METADATA_KEY, None) is not None:  # a run directory's, perhaps of an earlier version
        raw = upgraded(raw)
    if isinstance(raw.get("deepspeed"), str):
        raw["deepspeed"] = strict_json.read(path.parent / Path(raw["deepspeed"]).expanduser())
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError(Problem("extends", f"expected the path of a file, got {base!r}"))
    return merge(read_config_file(path.parent / base, (*seen, path)), raw)


def apply_override(raw: Raw, assignment: str) -> None:
    """Sets one value: `a.b=c`, where c is JSON or, failing that, a plain string; list items by number.

    Raises:
        ConfigError: if the assignment has no `=`, a name on its way is no object or list, or a number is not finite.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path.strip():
        raise ConfigError(Problem("--set", f"expected a.b=value, got '{assignment}'"))
    if path.strip() == "extends":
        raise ConfigError(Problem("--set extends", "only a file can extend another one", "Write it into the file"))
    try:
        value = strict_json.loads(text)
    except json.JSONDecodeError:
        value = text
    if problems := list(strict_json.not_finite(value, f"--set {path.strip()}")):
        raise ConfigError(problems)
    node: Any = raw
    keys = path.strip().split(".")
    for depth, key in enumerate(keys):
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise ConfigError(Problem(f"--set {path}", f"'{key}' is not an item of a list of {len(node)}"))
            index: Any = int(key)
        elif isinstance(node, dict):
            index = key
        else:
            raise ConfigError(Problem(f"--set {path}", f"'{'.'.join(keys[:depth])}' is a value, not an object"))
        if depth == len(keys) - 1:
            node[index] = value
        else:
            if isinstance(node, dict) and node.get(index) is None:
                node[index] = {}
            node = node[index]
