"""Verification of the model folder that a finished run has written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from trainer.checkpoint_format import FileRecord
from trainer.files import hash_file

_WEIGHTS, _INDEX, _CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_LONGEST_HEADER = 100_000_000
"""Limit of safetensors, in bytes."""


def find_damage(folder: Path, recorded: object) -> str:
    """Return the damage of a model folder, or an empty string. Reads every recorded file once.

    Args:
        folder: the model folder.
        recorded: name, size and hash of each file, as in the run's config.json. Earlier versions recorded none; then
            only the structure and length of the files are checked.
    """
    if not folder.is_dir():
        return f"{folder} is missing"
    try:
        files = _parsed(recorded)
        if files:
            return next(_differing(folder, files), "")
        return next(_malformed(folder), "")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"{folder} cannot be read: {error}"


def _parsed(recorded: object) -> tuple[FileRecord, ...]:
    if not isinstance(recorded, list):
        return ()
    try:
        files = tuple(FileRecord(str(file["name"]), int(file["bytes"]), str(file["hash"])) for file in recorded)
    except (TypeError, KeyError, ValueError):
        return ()
    plain = all(".." not in PurePosixPath(file.name).parts and not file.name.startswith("/") for file in files)
    return files if plain else ()


def _differing(folder: Path, files: tuple[FileRecord, ...]) -> Iterator[str]:
    for file in files:
        path = folder / file.name
        if not path.is_file():
            yield f"{path} is missing"
        elif path.stat().st_size != file.bytes:
            yield f"{path}: expected {file.bytes} bytes, got {path.stat().st_size}"
        elif hash_file(path) != file.hash:
            yield f"{path}: its hash differs from the recorded one"


def _malformed(folder: Path) -> Iterator[str]:
    """Yield damage that the structure of the files reveals, for folders of earlier versions."""
    json.loads((folder / _CONFIG).read_bytes())
    names = {_WEIGHTS}
    if (folder / _INDEX).exists():
        names = set(json.loads((folder / _INDEX).read_bytes())["weight_map"].values())
    for name in sorted(names):
        path = folder / name
        if not path.is_file():
            yield f"{path} is missing"
        elif path.stat().st_size != (length := _expected_length(path)):
            yield f"{path}: expected {length} bytes, got {path.stat().st_size}"


def _expected_length(path: Path) -> int:
    """Return the length of a safetensors file as its header states it."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > _LONGEST_HEADER:
            raise ValueError(f"{path.name} has no header")
        header = json.loads(file.read(size))
    ends = (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    return 8 + size + int(max(ends, default=0))
