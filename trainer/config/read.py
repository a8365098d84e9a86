"""Reading configuration files as plain JSON: `extends`, an external `deepspeed` file, and overrides."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config import strict_json
from trainer.config.earlier_versions import METADATA_KEY, upgrade_config
from trainer.errors import ConfigError, Problem
from trainer.json_types import Json

Raw = dict[str, Any]


def merge(base: Raw, over: Mapping[str, Any]) -> Raw:
    """Return `base` with the values of `over`: objects are merged key by key, anything else (lists too) is replaced."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def read_config_file(path: Path, seen: tuple[Path, ...] = ()) -> Raw:
    """Read a configuration file, merged with the files of `extends` and `deepspeed`.

    Paths in both keys are relative to the file that names them.

    Args:
        path: The file.
        seen: Files that extend it, to detect a cycle.

    Raises:
        ConfigError: A file cannot be read, or extends itself.
    """
    path = path.expanduser().resolve()
    if path in seen:
        chain = " -> ".join(p.name for p in (*seen, path))
        raise ConfigError(Problem(str(path), f"extends itself: {chain}"))
    raw = strict_json.read(path)
    raw.pop("$schema", None)
    if raw.pop(METADATA_KEY, None) is not None:  # the config.json of a run, perhaps of an earlier version
        raw = upgrade_config(raw)
    if "deepspeed" in raw:
        raw["deepspeed"] = read_deepspeed(raw["deepspeed"], path.parent)
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError(Problem("extends", f"expected the path of a file, got {base!r}"))
    return merge(read_config_file(path.parent / base, (*seen, path)), raw)


def read_deepspeed(section: Json, folder: Path, seen: tuple[Path, ...] = ()) -> Json:
    """Return a `deepspeed` section merged with the file that it names: the section is the path, or `extends` is.

    Args:
        section: The value in a configuration; returned unchanged if it names no file.
        folder: Folder that the path is relative to.
        seen: Files that extend it, to detect a cycle.

    Raises:
        ConfigError: A file cannot be read, or extends itself.
    """
    base = section.get("extends") if isinstance(section, dict) else section if isinstance(section, str) else None
    if base is None:
        return section
    if not isinstance(base, str):
        raise ConfigError(Problem("deepspeed.extends", f"expected the path of a file, got {base!r}"))
    path = (folder / Path(base).expanduser()).resolve()
    if path in seen:
        chain = " -> ".join(p.name for p in (*seen, path))
        raise ConfigError(Problem("deepspeed.extends", f"a file extends itself: {chain}"))
    below: Any = read_deepspeed(strict_json.read(path), path.parent, (*seen, path))
    over = {key: value for key, value in section.items() if key != "extends"} if isinstance(section, dict) else {}
    return merge(below, over)


def named_deepspeed_file(path: Path) -> str | None:
    """Return the DeepSpeed file that a configuration file itself names, as it is written there."""
    section = strict_json.read(path.expanduser()).get("deepspeed")
    named = section.get("extends") if isinstance(section, dict) else section
    return named if isinstance(named, str) else None


def apply_override(raw: Raw, assignment: str) -> None:
    """Set one value of a configuration, in place: `a.b=c`, where c is JSON or else a string, and lists have indices.

    `deepspeed=FILE` reads the file, relative to the working directory.

    Raises:
        ConfigError: The assignment is malformed, a key on its path is not an object or list, a number is not finite, or
            the DeepSpeed file cannot be read.
    """
    path, value = _parsed(assignment)
    node: Any = raw
    keys = path.split(".")
    for depth, key in enumerate(keys):
        if isinstance(node, list):
            if not key.isdecimal() or len(key) > 18 or int(key) >= len(node):
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


def _parsed(assignment: str) -> tuple[str, Json]:
    """Return the dotted key and the value of an override."""
    path, equals, text = assignment.partition("=")
    path = path.strip()
    if not equals or not all(path.split(".")):
        raise ConfigError(Problem("--set", f"expected a.b=value, got '{_shortened(assignment)}'"))
    if path.count(".") >= strict_json.MAX_DEPTH:
        raise ConfigError(Problem("--set", f"more than {strict_json.MAX_DEPTH} keys in '{_shortened(assignment)}'"))
    if path in ("extends", "deepspeed.extends"):
        remedy = "Write it into the file"
        remedy += "" if path == "extends" else ", or --set deepspeed=FILE and then single keys"
        raise ConfigError(Problem(f"--set {path}", "only a file can extend another one", remedy))
    try:
        value: Json = strict_json.loads(text)
    except json.JSONDecodeError:
        value = text
    except strict_json.TooDeepError as error:
        raise ConfigError(Problem(f"--set {path}", str(error))) from None
    if problems := list(strict_json.unrepresentable_values(value, f"--set {path}")):
        raise ConfigError(problems)
    return path, read_deepspeed(value, Path()) if path == "deepspeed" else value


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
