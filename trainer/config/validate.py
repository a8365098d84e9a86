"""Validation of one section at a time: from plain JSON to its typed class, with problems in our own words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError

from trainer.config.deepspeed import UNSUPPORTED
from trainer.config.earlier_versions import replaced_key_problem
from trainer.config.hints import hint
from trainer.config.schema import SECTIONS
from trainer.config.section import Section
from trainer.errors import Problem, closest_match
from trainer.json_types import Json

Raw = dict[str, Any]
Path = tuple[str | int, ...]
"""Keys of objects and indices of lists, from a section down."""

_MAX_SHOWN = 60
"""Characters of a value in a message."""


@dataclass
class SectionResult:
    """The outcome of validating a section."""

    section: Section | None = None
    """The section without its invalid keys; None if it cannot be built."""

    problems: list[Problem] = field(default_factory=list)
    invalid: set[str] = field(default_factory=set)
    """Dotted paths whose value is invalid or missing; rules that read them are skipped."""

    unresolved_autos: list[str] = field(default_factory=list)
    """Keys of the `deepspeed` section, dotted below it, that are "auto" where only the user can set the value."""


def validate_section(name: str, raw: Json) -> SectionResult:
    """Validate a section and build it from its valid part, so that rules can check the rest of it."""
    result = SectionResult()
    if not isinstance(raw, dict):
        result.problems.append(Problem(name, f"expected an object, got {_shown(raw)}"))
        result.invalid.add(name)
        return result
    remaining: Raw = json.loads(json.dumps(raw))
    for is_repaired in (False, True):
        try:
            result.section = SECTIONS[name].model_validate_json(json.dumps(remaining))
            return result
        except ValidationError as error:
            report = result if not is_repaired else SectionResult()  # the rest of the first problems is not reported
            remaining = _examine(name, remaining, error, report)
            result.invalid |= report.invalid
    return result


def _examine(name: str, raw: Raw, error: ValidationError, result: SectionResult) -> Raw:
    """Add the problems of a section to `result`; return the section without the values that cause them."""
    by_path: dict[Path, list[Any]] = {}
    for item in error.errors(include_url=False):
        by_path.setdefault(_path_in_json(item["loc"], raw), []).append(item)
    repaired: Raw = json.loads(json.dumps(raw))
    for path, items in by_path.items():
        key = ".".join(str(part) for part in (name, *path))
        error_type = items[0]["type"]
        if error_type == "extra_forbidden":
            result.problems.append(_unknown_key_problem(name, path, repaired))
            continue
        result.invalid.add(key)
        if error_type == "missing":
            result.problems.append(Problem(key, "required, but missing"))
            continue
        value = _value_at(raw, path)
        if name == "deepspeed" and value == "auto":
            result.unresolved_autos.append(".".join(map(str, path)))
        else:
            expected = _expected(item["msg"] for item in items)
            result.problems.append(Problem(key, f"expected {expected}, got {_shown(value)}"))
        parent = _value_at(repaired, path[:-1])
        if path and isinstance(parent, dict):
            parent.pop(str(path[-1]), None)
    return repaired


def _path_in_json(location: Path, raw: Json) -> Path:
    """Return the location of a pydantic error without the names of union members, which it lists like keys."""
    path: list[str | int] = []
    node: Any = raw
    for part in location:
        is_index = isinstance(node, list) and isinstance(part, int) and part < len(node)
        if is_index or (isinstance(node, dict) and part in node):
            node = node[part]
        elif isinstance(node, dict) and isinstance(part, str) and re.fullmatch(r"\w+", part) and part == location[-1]:
            return (*path, part)
        else:
            continue
        path.append(part)
    return tuple(path)


def _value_at(raw: Json, path: Path) -> Json:
    node: Any = raw
    for part in path:
        node = node[part]
    value: Json = node
    return value


def _known_keys_at(section_class: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """Return the keys of the object at `path` below a section."""
    node: type[BaseModel] | None = section_class
    for part in path:
        if node is not None and isinstance(part, str):
            known_field = node.model_fields.get(part)
            node = None if known_field is None else _section_class_in(known_field.annotation)
    return [] if node is None else sorted(node.model_fields)


def _section_class_in(annotation: object) -> type[BaseModel] | None:
    """Return the pydantic class inside an optional, list or annotated type; None if there is none."""
    members = getattr(annotation, "__args__", ())
    if isinstance(annotation, type) and not members:
        return annotation if issubclass(annotation, BaseModel) else None
    classes = (_section_class_in(member) for member in members)
    return next((section_class for section_class in classes if section_class is not None), None)


def _shown(value: Json) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def _expected(messages: Iterable[str]) -> str:
    """Merge the error messages of a union's members into one phrase."""
    phrases = []
    for message in messages:
        phrase = message.removeprefix("Input should be ").removeprefix("a valid ").replace("integer", "whole number")
        phrases.append(phrase.replace("dictionary", "object").replace("boolean", "true or false"))
    return " or ".join(dict.fromkeys(phrases))


def _unknown_key_problem(name: str, path: Path, repaired: Raw) -> Problem:
    """Remove an unknown key from `repaired` and return its problem. A misspelled key gets its correct name instead."""
    key = ".".join(str(part) for part in (name, *path))
    below = ".".join(str(part) for part in path)
    parent: Any = _value_at(repaired, path[:-1])
    value = parent.pop(path[-1])
    if name == "deepspeed" and below in UNSUPPORTED:
        reason, remedy = UNSUPPORTED[below]
        return Problem(key, reason, remedy)
    if replaced := replaced_key_problem(key):
        return replaced
    if hinted := hint(key):
        return hinted
    last = str(path[-1])
    candidates = _known_keys_at(SECTIONS[name], path[:-1])
    if match := closest_match(last, candidates):
        parent.setdefault(match, value)
        return Problem(key, f"unknown key; did you mean '{match}'?")
    if owners := _sections_with(last):
        return Problem(key, f"unknown key; there is '{owners[0]}.{last}'")
    return Problem(key, "unknown key", f"Known: {', '.join(candidates)}" if candidates else "")


def _sections_with(key: str) -> list[str]:
    return [name for name, section_class in SECTIONS.items() if key in section_class.model_fields]


def _section_hints(name: str, value: Json, *, only_below: bool) -> list[Problem]:
    """Return hints for an unknown section: for each of its keys that other trainers have, or else for itself."""
    below = [hint(f"{name}.{key}") for key in value] if isinstance(value, dict) else []
    if hints := [problem for problem in below if problem]:
        return hints
    problem = None if only_below else hint(name)
    return [] if problem is None else [problem]


def unknown_sections(raw: Raw) -> list[Problem]:
    """Remove unknown sections from `raw` and return their problems. A misspelled one gets its correct name instead."""
    problems = []
    for name in [key for key in raw if key not in SECTIONS]:
        match, owners = closest_match(name, [*SECTIONS, "extends"]), _sections_with(name)
        if hints := _section_hints(name, raw[name], only_below=bool(owners)):
            problems += hints
        elif match:
            problems.append(Problem(name, f"unknown section; did you mean '{match}'?"))
            raw.setdefault(match, raw[name])
        elif owners:
            problems.append(Problem(name, f"unknown section; '{owners[0]}.{name}' is a key"))
        else:
            problems.append(Problem(name, "unknown section", f"Known: {', '.join(SECTIONS)}"))
        del raw[name]
    return problems
