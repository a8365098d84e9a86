"""Renders docs/configuration.md from the schema: every key with its type, default and meaning."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from trainer.config.deepspeed import RESOLVED_AUTOS
from trainer.config.schema import Config

Schema = Mapping[str, Any]

_HEADER = """\
# Configuration

<!-- Written by `python -m tools.schema` from trainer/config/schema.py. Do not edit. -->

A run is configured by one JSON file, `--config X.json`, with the sections below. Unknown keys are refused, with the
nearest known one; all problems are reported at once, before anything starts. An editor that reads the key `$schema`
(`"$schema": "schema.json"` in `ds_configs/`) completes and checks keys.

- `--set a.b=value` overrides a key, for example `--set training.max_steps=10`. The value is JSON, or a string.
- `--print_config` prints the configuration as resolved, `--dry_run` describes the run; neither starts anything.

Three keys at the top of the file belong to no section:

| key | meaning |
| --- | --- |
| `extends` | A file whose values this one overrides: objects key by key, anything else is replaced. |
| `$schema` | For editors. Ignored. |
| `tessera` | Metadata of a run in its `config.json`. Ignored when that file is run again. |
"""

_DEEPSPEED_NOTE = """\
A standard DeepSpeed configuration: the section itself, the path of a file that holds one, or
`{"extends": "FILE", ...}` with values that override the file's. An unset key has DeepSpeed's default unless its
meaning says otherwise. Keys that DeepSpeed ignores or that Tessera replaces are refused with a reason, unless they are
disabled. Two of the three batch keys are required.
"""

_TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def configuration_page() -> str:
    """Return the text of docs/configuration.md."""
    schema = Config.model_json_schema()
    lines = [_HEADER, "| section | content |", "| --- | --- |"]
    sections = {name: _resolve(section, schema) for name, section in schema["properties"].items()}
    for name, section in sections.items():
        required = " **Required.**" if name in schema["required"] else ""
        lines.append(f"| [`{name}`](#{name}) | {_one_line(section.get('description', ''))}{required} |")
    for name, section in sections.items():
        note = _DEEPSPEED_NOTE if name == "deepspeed" else section.get("description", "")
        lines += ["", f"## {name}", "", note.rstrip(), *_tables(name, section, schema)]
    return "\n".join(lines) + "\n"


def _tables(path: str, section: Schema, schema: Schema) -> Iterator[str]:
    """Yield the table of an object's keys, followed by those of the objects below it."""
    yield from ("", "| key | type | default | meaning |", "| --- | --- | --- | --- |")
    required = section.get("required", ())
    nested: dict[str, Schema] = {}
    for key, value in section["properties"].items():
        dotted = f"{path}.{key}"
        default = "**required**" if key in required else _default(value)
        if (below := _object_in(value, schema)) is not None:
            nested[dotted] = below
        meaning = _meaning(dotted, value) or ("See below." if below else "As in DeepSpeed.")
        yield f"| `{key}` | {_type(value, schema)} | {default} | {meaning} |"
    for dotted, below in nested.items():
        yield from ("", f"### {dotted}")
        if description := below.get("description"):
            yield from ("", description)
        yield from _tables(dotted, below, schema)


def _resolve(value: Schema, schema: Schema) -> Schema:
    """Return the definition that `$ref` names, or the value itself."""
    reference = value.get("$ref")
    return value if reference is None else schema["$defs"][reference.rpartition("/")[2]]


def _alternatives(value: Schema) -> list[Schema]:
    return list(value.get("anyOf", [value]))


def _object_in(value: Schema, schema: Schema) -> Schema | None:
    """Return the object with known keys that a value is, or that its list holds; None if there is none."""
    for alternative in _alternatives(value):
        target = _resolve(alternative.get("items", alternative), schema)
        if "properties" in target:
            return target
    return None


def _type(value: Schema, schema: Schema) -> str:
    names = [_simple_type(alternative, schema) for alternative in _alternatives(value)]
    return _one_line(" or ".join(dict.fromkeys(name for name in names if name)))


def _simple_type(value: Schema, schema: Schema) -> str:
    value = _resolve(value, schema)
    if "const" in value or "enum" in value:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in value.get("enum", [value.get("const")]))
    if value.get("type") == "null":
        return ""
    if value.get("type") == "array":
        items = _type(value["items"], schema) if value.get("items") else "any"
        return f"list of {items}"
    if value.get("type") == "object" or "properties" in value:
        values = value.get("additionalProperties")
        return f"object of {_type(values, schema)}" if isinstance(values, Mapping) and values else "object"
    bounds = [f"{sign} {value[bound]:,}" for bound, sign in _BOUNDS.items() if bound in value]
    return " ".join(filter(None, (_TYPES.get(value.get("type", ""), "any"), ", ".join(bounds))))


def _default(value: Schema) -> str:
    """Return the default; nothing for a key that is unset by default, or an object whose keys have their own."""
    default = value.get("default")
    is_section = isinstance(default, Mapping) and bool(default)
    return "" if default is None or is_section else f"`{json.dumps(default)}`"


def _meaning(dotted: str, value: Schema) -> str:
    meaning = _one_line(value.get("description", ""))
    automatic = RESOLVED_AUTOS.get(dotted.removeprefix("deepspeed."))
    if dotted.startswith("deepspeed.") and automatic is not None:
        meaning = f'{meaning} `"auto"`: {automatic}.'.strip()
    return meaning


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")
