"""Seeded mutations of JSON and binary files, like mistakes of users, disks and other programs."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_DEEP = 100_000
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    2**31,
    2**63 - 1,
    2**63,
    -(2**63),
    10**18,
    10**300,
    1.5,
    -0.0,
    1e308,
    1e-320,
    "",
    "auto",
    "nowhere",
    "../..",
    "/dev/null",
    "/proc/self/mem",
    "*",
    "\x00",
    "\x1b[2J\x07",
    "\u202e",
    "\ud800",
    "é💥",
    "a" * 5000,
    "s3://***@b/x",
    "nosuchscheme://u:p@h/x",
    [],
    {},
    [[]],
    [None],
    {"": 1},
    {"a": {"b": [1, {}]}},
    [[[[[[[[[[]]]]]]]]]],
)
"""Values that replace a valid one."""


def _json_paths(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _json_paths(item, (*path, key))


def mutated_json(value: object, rng: random.Random) -> str:
    """Return the text of `value` with one to three mutations."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        paths = [path for path in _json_paths(value) if path]
        if not paths:
            break
        *above, last = rng.choice(paths)
        holder = value
        for key in above:
            holder = holder[key]
        mutation = rng.choice(("replace", "replace", "replace", "delete", "rename", "wrap", "add"))
        if mutation == "replace":
            holder[last] = copy.deepcopy(rng.choice(ODD_VALUES))
        elif mutation == "delete":
            del holder[last]
        elif mutation == "wrap":
            holder[last] = rng.choice(([holder[last]], {"value": holder[last]}, str(holder[last])))
        elif isinstance(holder, dict):
            name = rng.choice((f"{last}s", "", "\x1b]0;x\x07", "extends", "__class__", "a.b", str(last).upper()))
            holder[name] = holder.pop(last) if mutation == "rename" else copy.deepcopy(rng.choice(ODD_VALUES))
    text = json.dumps(value)
    mutation = rng.choice(("keep",) * 8 + ("cut", "number", "nest", "bytes"))
    if mutation == "cut":
        return text[: rng.randrange(len(text) + 1)]
    if mutation == "number":
        return text.replace(": 1", f": {rng.choice(('1e999', 'NaN', '-Infinity', '1' * 400, '01', '1_0'))}", 1)
    if mutation == "nest":
        return '{"a":' * _DEEP if rng.random() < 0.5 else "[" * 500 + text + "]" * 500
    if mutation == "bytes":
        offset = rng.randrange(len(text) + 1)
        return text[:offset] + rng.choice(("\x00", "\ufeff", "//", "'", ",", "}", "\udcff")) + text[offset:]
    return text


def damage(file: Path, rng: random.Random) -> str:
    """Damage a file of a run; return the type of damage."""
    if file.suffix == ".json" and rng.random() < 0.7:
        file.write_bytes(mutated_json(json.loads(file.read_text()), rng).encode(errors="surrogateescape"))
        return "JSON"
    data = bytearray(file.read_bytes())
    mutation = rng.choice(("truncate", "flip", "empty", "zero", "append", "remove", "folder", "noise"))
    if mutation == "truncate":
        data = data[: rng.randrange(len(data) + 1)]
    elif mutation == "flip" and data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif mutation == "empty":
        data = bytearray()
    elif mutation == "zero" and data:
        offset = rng.randrange(len(data))
        data[offset : offset + 64] = bytes(len(data[offset : offset + 64]))
    elif mutation == "append":
        data += rng.choice((b"\x00" * 64, b'{"a":' * _DEEP + b"\n", b"\xff\xfe\n", b"{}\n", b"[]\n", b"null\n"))
    elif mutation == "noise":
        data = bytearray(rng.randbytes(max(1, len(data) // 2)))
    if mutation in ("remove", "folder"):
        file.unlink()
        if mutation == "folder":
            file.mkdir()
    else:
        file.write_bytes(bytes(data))
    return mutation
