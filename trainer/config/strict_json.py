"""Standard JSON: no comments, no byte order mark, no duplicate keys. Errors name line and column."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config.file_search import special_file_type
from trainer.errors import ConfigError, Problem
from trainer.json_types import Json

MAX_DEPTH = 100
"""Maximum nesting of objects and lists, far below the limit of Python's stack."""

_INVALID_TEXT = re.compile("[\x00\ud800-\udfff]")
"""Characters that no file name and no UTF-8 file can contain."""


class TooDeepError(ValueError):
    """JSON that is nested deeper than `MAX_DEPTH`."""

    def __init__(self) -> None:
        super().__init__(f"nested more than {MAX_DEPTH} levels deep")


_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|[{}\[\]:]')


def _position(text: str, offset: int) -> str:
    line = text.count("\n", 0, offset) + 1
    return f"line {line}, column {offset - text.rfind(chr(10), 0, offset)}"


def _duplicates(text: str) -> list[tuple[str, int]]:
    """Return duplicate keys of an object in valid JSON, with the offset of the second."""
    duplicates: list[tuple[str, int]] = []
    objects: list[set[str] | None] = []
    last: tuple[str, int] | None = None
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token == "{":
            objects.append(set())
        elif token == "[":
            objects.append(None)
        elif token in "}]":
            objects.pop()
        elif token == ":" and last is not None and (keys := objects[-1]) is not None:
            key = json.loads(last[0])
            if key in keys:
                duplicates.append((key, last[1]))
            keys.add(key)
        last = (token, match.start()) if token.startswith('"') else None
    return duplicates


def _reason(text: str, error: json.JSONDecodeError) -> str:
    rest = text[error.pos :].lstrip()
    if rest.startswith(("//", "/*", "#")):
        return "JSON has no comments"
    if not rest or error.msg.startswith("Unterminated string"):
        return "the file ends before the JSON is complete"
    if rest[0] in "}]" and text[: error.pos].rstrip().endswith(","):
        return "a comma before the closing bracket"
    if rest.startswith("'"):
        return "JSON strings need double quotes"
    return error.msg


class _NotFinite(float):
    """An infinite number or NaN, with the text that it was written as: 1e999, Infinity, NaN."""

    def __new__(cls, literal: str) -> _NotFinite:
        number = super().__new__(cls, literal)
        number.literal = literal
        return number

    literal: str


def _float(literal: str) -> float:
    value = float(literal)
    return value if math.isfinite(value) else _NotFinite(literal)


def _int(literal: str) -> int | float:
    """Parse an integer. One that is too large for a float is not finite, because it may be converted to a float."""
    return int(literal) if math.isfinite(float(literal)) else _NotFinite(literal)


def loads(text: str) -> Json:
    """Decode JSON. `unrepresentable_values` detects numbers that are not finite in the result.

    Raises:
        TooDeepError: It is nested deeper than `MAX_DEPTH`.
        json.JSONDecodeError: It is not JSON.
    """
    try:
        value: Json = json.loads(text, parse_constant=_NotFinite, parse_float=_float, parse_int=_int)
    except RecursionError:
        raise TooDeepError from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for node in level if isinstance(node, dict | list) for item in _items(node)]
    if any(isinstance(node, dict | list) for node in level):
        raise TooDeepError
    return value


def _items(node: dict[str, Json] | list[Json]) -> list[Json]:
    return list(node.values()) if isinstance(node, dict) else node


def unrepresentable_values(value: Json, key: str = "") -> Iterator[Problem]:
    """Yield a problem for each infinite number or NaN, and for each string that is not valid text.

    Args:
        value: A result of `loads`.
        key: Dotted key of `value`.
    """
    if isinstance(value, _NotFinite):
        literal = value.literal if len(value.literal) <= 40 else value.literal[:37] + "..."
        yield Problem(key, f"must be a finite number (got {literal})")
    elif isinstance(value, str) and _INVALID_TEXT.search(value):
        yield Problem(key, f"must be text without null characters and in valid Unicode (got {value[:40]!a})")
    elif isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from unrepresentable_values(item, f"{key}.{name}" if key else str(name))


def parse(text: str, where: str) -> dict[str, Any]:
    """Decode a JSON object.

    Args:
        text: The JSON.
        where: The file, for messages.

    Raises:
        ConfigError: The text is not one standard JSON object (names line and column), or a number is not finite (names
            the key).
    """
    if text.startswith("\ufeff"):
        raise ConfigError(Problem(where, "line 1, column 1: a byte order mark", "Save the file as plain UTF-8"))
    try:
        value = loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(Problem(where, f"{_position(text, error.pos)}: {_reason(text, error)}")) from None
    except ValueError as error:
        raise ConfigError(Problem(where, str(error))) from None
    duplicates = _duplicates(text)
    if duplicates:
        raise ConfigError(
            Problem(where, f"{_position(text, offset)}: duplicate key '{key}'") for key, offset in duplicates
        )
    if problems := list(unrepresentable_values(value)):
        raise ConfigError(Problem(f"{where}: {problem.path}", problem.reason) for problem in problems)
    if not isinstance(value, dict):
        raise ConfigError(Problem(where, f"expected a JSON object, got {type(value).__name__}"))
    return value


def read(path: Path) -> dict[str, Any]:
    """Decode the object in a JSON file; see `parse`.

    Raises:
        ConfigError: The file cannot be read, or `parse` refuses its content.
    """
    if (file_type := special_file_type(path)) is not None:
        raise ConfigError(Problem(str(path), f"is {file_type}", "Use a regular file"))
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(Problem(str(path), "no such file")) from None
    except OSError as error:
        raise ConfigError(Problem(str(path), f"cannot be read: {error.strerror}")) from None
    except UnicodeDecodeError as error:
        raise ConfigError(Problem(str(path), f"not UTF-8 at byte {error.start}", "Save the file as UTF-8")) from None
    return parse(text, str(path))
