"""Where text comes from: files of several kinds, folders, the hub, and the standard library's own source."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from trainer.config import strict_json
from trainer.config.paths import (
    BUILTIN,
    HUB,
    compression_of,
    has_splits,
    kind_of,
    matching_files,
    only_tokens,
)
from trainer.data.json_array import is_array
from trainer.data.tables import TABLES, table_rows
from trainer.data.text import Piece, as_text, json_elements, json_lines, pieces_of, plain_text, too_large
from trainer.errors import ConfigError, DataError, Problem

Split = Literal["train", "validation"]

LARGEST_DOCUMENT = 64_000_000
"""Default of `data.max_document_bytes`."""

_HELD_OUT_OF_100 = 5
_LEFT_OUT = ("site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "turtledemo")


@dataclass(frozen=True)
class Source:
    """One entry of `data.train` or `data.validation`, resolved to what there is to read."""

    path: str
    split: Split
    text_field: str
    largest: int = LARGEST_DOCUMENT
    """Bytes of a document at most, where it is in memory as a whole."""

    @property
    def files(self) -> list[Path]:
        if self.path == BUILTIN:
            return stdlib_files(self.split)
        return [] if self.path.startswith(HUB) else matching_files(self.path)

    @property
    def is_indexed(self) -> bool:
        """Whether the tokens are there already, as .bin and .idx."""
        return only_tokens(self.path)

    @property
    def total_bytes(self) -> int | None:
        """Bytes of text to read, where that is known beforehand: not of what is compressed."""
        files = self.files
        if not files or any(f.is_dir() or f.suffix in TABLES or compression_of(f) for f in files):
            return None
        return sum(f.stat().st_size for f in files)

    def appearance(self) -> list[list[Any]]:
        """What tells, without reading, whether the source is still the same: names, sizes, times."""
        if self.path.startswith(HUB):
            return [[self.path, self.split, _hub_revision(self.path)]]
        found = []
        for file in self.files:
            parts = sorted(p for p in file.rglob("*") if p.is_file()) if file.is_dir() else [file]
            for part in parts:
                stat = part.stat()
                found.append([str(part.resolve()), stat.st_size, stat.st_mtime_ns])
        return found

    def content_hash(self) -> str:
        """A hash of what the source says, whatever its files are called."""
        whole = hashlib.sha256(self.split.encode() if self.path.startswith(HUB) or self._is_saved else b"")
        if self.path.startswith(HUB):
            whole.update(json.dumps([self.path, _hub_revision(self.path)]).encode())
        for file in self.files:
            parts = sorted(p for p in file.rglob("*") if p.is_file()) if file.is_dir() else [file]
            for part in parts:
                with part.open("rb") as handle:
                    kind = f"{kind_of(part)}{compression_of(part)}" if compression_of(part) else part.suffix
                    whole.update(kind.encode() + hashlib.file_digest(handle, "sha256").digest())
        return whole.hexdigest()

    @property
    def _is_saved(self) -> bool:
        files = self.files
        return len(files) == 1 and files[0].is_dir()

    def pieces(self) -> Iterator[Piece]:
        """The text, in order.

        Raises:
            DataError: naming the file and the line, row or byte, for anything that cannot be read as text.
        """
        if self.path.startswith(HUB):
            yield from self._hub_rows()
        for is_table, files in groupby(self.files, lambda file: file.is_dir() or file.suffix in TABLES):
            if is_table:
                yield from self._table_rows([_of_split(file, self.split) for file in files])
            else:
                for file in files:
                    yield from self._text_pieces(file)

    def _text_pieces(self, file: Path) -> Iterator[Piece]:
        if kind_of(file) == ".json" and is_array(file):
            yield from json_elements(file, self.text_field, self.largest)
        elif kind_of(file) in (".jsonl", ".json"):
            yield from json_lines(file, self.text_field, self.largest)
        else:
            yield from plain_text(file)

    def _table_rows(self, files: list[Path]) -> Iterator[Piece]:
        for row in table_rows(files, self.text_field, self.largest):
            text = as_text(row.text, row.where, self.text_field)
            yield from pieces_of(text, len(text))

    def _hub_rows(self) -> Iterator[Piece]:
        try:
            for number, row in enumerate(_from_hub(self.path, self.split), start=1):
                where = f"{self.path}: row {number}"
                if self.text_field not in row:
                    have = ", ".join(f"'{key}'" for key in row)
                    raise DataError(f"{where} has no field '{self.text_field}', only {have}")
                text = as_text(row[self.text_field], where, self.text_field)
                if len(text) > self.largest:
                    raise too_large(where, len(text.encode()), self.largest)
                yield from pieces_of(text, len(text))
        except (DataError, ConfigError):
            raise
        except Exception as error:  # whatever pyarrow, pandas and fsspec raise on damaged files
            cause = error.__cause__ or error
            first = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            raise DataError(f"{self.path}: cannot be read: {first}") from error


def stdlib_files(split: Split) -> list[Path]:
    """The standard library's own modules, divided into train and validation by the file's name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]  # site-packages may hold 100,000 files
        modules += [Path(folder, name) for name in names if name.endswith(".py")]
    files = []
    for file in sorted(modules):
        held_out = zlib.crc32(file.relative_to(root).as_posix().encode()) % 100 < _HELD_OUT_OF_100
        if held_out == (split == "validation") and file.stat().st_size:
            files.append(file)
    return files


def _of_split(file: Path, split: Split) -> Path:
    """Of a folder with several splits, saved by `datasets`, the folder of this one; any other file itself.

    Raises:
        ConfigError: it has no such split.
    """
    if not file.is_dir() or not has_splits(file):
        return file
    try:
        splits = [str(name) for name in strict_json.read(file / "dataset_dict.json")["splits"]]
    except (ConfigError, LookupError, TypeError) as error:
        raise DataError(f"{file}: not a dataset that can be loaded: {error}") from None
    if split not in splits:
        raise ConfigError(Problem(f"data.{split}", f"'{file}' has no split '{split}', only {', '.join(splits)}"))
    return file / split


def _hub_name(path: str) -> tuple[str, str | None]:
    parts = path.removeprefix(HUB).split("/")
    return "/".join(parts[:2]), "/".join(parts[2:]) or None


def _hub_problem(path: str, error: Exception) -> ConfigError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ConfigError(
        Problem(
            "data",
            f"'{path}' cannot be had from the hub: {first}",
            "Check the name and the network, or give local files",
        )
    )


@functools.cache
def _hub_revision(path: str) -> str:
    """The commit that the dataset is at, so that a changed dataset is tokenised anew."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(_hub_name(path)[0], timeout=30).sha)
    except Exception as error:
        raise _hub_problem(path, error) from None


def _from_hub(path: str, split: Split) -> Any:
    import datasets

    name, configuration = _hub_name(path)
    revision = _hub_revision(path)
    try:
        return datasets.load_dataset(name, configuration, split=split, streaming=True, revision=revision)
    except Exception as error:
        raise _hub_problem(path, error) from None
