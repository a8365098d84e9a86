"""One section at a time: from plain JSON to its typed class, with every mistake told in our own words."""

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
from trainer.config.rules import Draft
from trainer.config.schema import SECTIONS
from trainer.errors import Problem, closest_match

Raw = dict[str, Any]


def _path_in_json(loc: Sequence[str | int], raw: Any) -> tuple[str | int, ...]:
    """`loc` of a pydantic error without the names of union members, which stand in it like keys."""
    path: list[str | int] = []
    for part in loc:
        in_list = isinstance(raw, list) and isinstance(part, int) and part < len(raw)
        if in_list or (isinstance(raw, dict) and part in raw):
            raw = raw[part]
        elif isinstance(raw, dict) and isinstance(part, str) and re.fullmatch(r"\w+", part) and part == loc[-1]:
            return (*path, part)
        else:
            continue
        path.append(part)
    return tuple(path)


def _known_keys_at(section: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """The keys that the object at `path` below `section` may hold."""
    section_class: Any = section
    for part in path:
        if isinstance(part, str) and isinstance(section_class, type) and issubclass(section_class, BaseModel):
            field = section_class.model_fields.get(part)
            section_class = field.annotation if field else None
        section_class = _section_class_in(section_class)
    return (
        sorted(section_class.model_fields)
        if isinstance(section_class, type) and issubclass(section_class, BaseModel)
        else []
    )


def _section_class_in(annotation: Any) -> Any:
    """The pydantic class inside `annotation` (optional, list or annotated), if there is one."""
    if isinstance(annotation, type) and not getattr(annotation, "__args__", ()):
        return annotation
    for member in getattr(annotation, "__args__", ()):
        found = _section_class_in(member)
        if isinstance(found, type) and issubclass(found, BaseModel):
            return found
    return None


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def _expected(messages: Iterable[str]) -> str:
    """One phrase out of what each member of a union had to say."""
    phrases = []
    for message in messages:
        phrase = message.removeprefix("Input should be ").removeprefix("a valid ").replace("integer", "whole number")
        phrase = phrase.replace("dictionary", "object").replace("boolean", "true or false")
        phrases.append(phrase)
    return " or ".join(dict.fromkeys(phrases))


@dataclass
class SectionResult:
    """What validating one section said: problems, and the data without what caused them."""

    problems: list[Problem]
    invalid: set[str]
    """Dotted paths whose value is wrong or missing; rules that read them are skipped."""

    repaired: Raw
    unresolved_autos: list[str] = field(default_factory=list)
    """Keys of the `deepspeed` section, dotted below it, that are "auto" where only the user can give the value."""


def _examine(name: str, raw: Raw, error: ValidationError) -> SectionResult:
    grouped: dict[tuple[str | int, ...], list[Any]] = {}
    for item in error.errors(include_url=False):
        grouped.setdefault(_path_in_json(item["loc"], raw), []).append(item)
    result = SectionResult([], set(), json.loads(json.dumps(raw)))
    for path, items in grouped.items():
        dotted = ".".join(str(part) for part in (name, *path))
        first = items[0]
        if first["type"] == "extra_forbidden":
            result.problems.append(_unknown_key(name, raw, path, result.repaired))
            continue
        result.invalid.add(dotted)
        if first["type"] == "missing":
            result.problems.append(Problem(dotted, "required, but missing"))
            continue
        value = _at(raw, path)
        kinds = _expected(item["msg"] for item in items)
        if name == "deepspeed" and value == "auto":
            result.unresolved_autos.append(".".join(map(str, path)))
        else:
            result.problems.append(Problem(dotted, f"expected {kinds}, got {_shown(value)}"))
        holder = _at(result.repaired, path[:-1])
        if path and isinstance(holder, dict):
            holder.pop(path[-1], None)
    return result


def _at(raw: Any, path: Sequence[str | int]) -> Any:
    for part in path:
        raw = raw[part]
    return raw


def _unknown_key(name: str, raw: Raw, path: tuple[str | int, ...], repaired: Raw) -> Problem:
    """The problem of an unknown key. Where it is a misspelling, `repaired` goes on with what was meant."""
    dotted = ".".join(str(part) for part in (name, *path))
    below = ".".join(str(part) for part in path)
    holder = _at(repaired, path[:-1])
    value = holder.pop(path[-1])
    if name == "deepspeed" and below in UNSUPPORTED:
        reason, remedy = UNSUPPORTED[below]
        return Problem(dotted, reason, remedy)
    if replaced := replaced_key_problem(dotted):
        return replaced
    if hinted := hint(dotted):
        return hinted
    key = str(path[-1])
    candidates = _known_keys_at(SECTIONS[name], path[:-1])
    if match := closest_match(key, candidates):
        holder.setdefault(match, value)
        return Problem(dotted, f"unknown key; did you mean '{match}'?")
    elsewhere = [s for s, section_class in SECTIONS.items() if key in section_class.model_fields]
    if elsewhere:
        return Problem(dotted, f"unknown key; there is '{elsewhere[0]}.{key}'")
    return Problem(dotted, "unknown key", f"Known: {', '.join(candidates)}" if candidates else "")


def validate_section(name: str, raw: Any, draft: Draft) -> SectionResult:
    section_class = SECTIONS[name]
    if not isinstance(raw, dict):
        return SectionResult([Problem(name, f"expected an object, got {_shown(raw)}")], {name}, {})
    total = SectionResult([], set(), raw)
    for _ in range(2):  # the second time on what is left, so that rules still see the sound part
        try:
            setattr(draft, name, section_class.model_validate_json(json.dumps(total.repaired)))
            return total
        except ValidationError as error:
            found = _examine(name, total.repaired, error)
        if not total.problems:
            total = found
        else:
            total.invalid |= found.invalid
    return total


def _hints(name: str, value: Any, *, below_only: bool) -> list[Problem]:
    """Hints for an unknown section: for each of its keys that other trainers have, or else for itself."""
    below = [hint(f"{name}.{key}") for key in value] if isinstance(value, dict) else []
    found = [each for each in below if each]
    own = None if found or below_only else hint(name)
    return found if own is None else [own]


def unknown_sections(raw: Raw) -> list[Problem]:
    problems = []
    for name in [key for key in raw if key not in SECTIONS]:
        match = closest_match(name, [*SECTIONS, "extends"])
        owner = [s for s, section_class in SECTIONS.items() if name in section_class.model_fields]
        hinted = _hints(name, raw[name], below_only=bool(owner))
        if hinted:
            problems += hinted
        elif match:
            problems.append(Problem(name, f"unknown section; did you mean '{match}'?"))
            raw.setdefault(match, raw[name])
        elif owner:
            problems.append(Problem(name, f"unknown section; '{owner[0]}.{name}' is a key"))
        else:
            problems.append(Problem(name, "unknown section", f"Known: {', '.join(SECTIONS)}"))
        del raw[name]
    return problems
