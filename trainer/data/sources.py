"""Sources of text: files of several formats, directories, hub datasets, and the standard library's own source."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

from trainer.config import strict_json
from trainer.config.paths import (
    BUILTIN,
    HUB,
    compression_of,
    data_suffix,
    has_dataset_splits,
    has_only_token_files,
    matching_files,
)
from trainer.data.documents import (
    TextChunk,
    document_too_large,
    read_json_array,
    read_json_lines,
    read_text_file,
    split_document,
    validate_text,
)
from trainer.data.json_array import is_array
from trainer.data.tables import TABLES, read_table_rows
from trainer.errors import ConfigError, DataError, Problem, first_line

Split = Literal["train", "validation"]

FileSignature = list[list[str | int]]
"""[path, size in bytes, modification time in ns] of each file, or [path, split, commit] of a hub dataset."""

DEFAULT_MAX_DOCUMENT_BYTES = 64_000_000
"""Default of `data.max_document_bytes`."""

_VALIDATION_PERCENT = 5
_EXCLUDED_FOLDERS = ("site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "turtledemo")


@dataclass(frozen=True)
class Source:
    """One entry of `data.train` or `data.validation`, resolved to files or a hub dataset."""

    path: str
    split: Split
    text_field: str
    max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES
    """Limit on the size of documents that are in memory as a whole."""

    @property
    def files(self) -> list[Path]:
        """Files to read, in order; empty for a hub dataset."""
        if self.path == BUILTIN:
            return stdlib_files(self.split)
        return [] if self.path.startswith(HUB) else matching_files(self.path)

    @property
    def is_indexed(self) -> bool:
        """Whether the source consists of token files (.bin and .idx)."""
        return has_only_token_files(self.path)

    @property
    def total_bytes(self) -> int | None:
        """Total bytes of text; None if it is not known beforehand, as for tables and compressed files."""
        files = self.files
        if not files or any(f.is_dir() or f.suffix in TABLES or compression_of(f) for f in files):
            return None
        return sum(f.stat().st_size for f in files)

    def signature(self) -> FileSignature:
        """Return names, sizes and modification times of the files, or the commit of a hub dataset."""
        if self.path.startswith(HUB):
            return [[self.path, self.split, _hub_revision(self.path)]]
        file_signatures: FileSignature = []
        for file in self.files:
            parts = sorted(p for p in file.rglob("*") if p.is_file()) if file.is_dir() else [file]
            for part in parts:
                stat = part.stat()
                file_signatures.append([str(part.resolve()), stat.st_size, stat.st_mtime_ns])
        return file_signatures

    def content_hash(self) -> str:
        """Return a hash of the text, which does not depend on the names of the files."""
        hasher = hashlib.sha256(self.split.encode() if self.path.startswith(HUB) or self._is_saved_dataset else b"")
        if self.path.startswith(HUB):
            hasher.update(json.dumps([self.path, _hub_revision(self.path)]).encode())
        for file in self.files:
            parts = sorted(p for p in file.rglob("*") if p.is_file()) if file.is_dir() else [file]
            for part in parts:
                with part.open("rb") as handle:
                    suffix = f"{data_suffix(part)}{compression_of(part)}" if compression_of(part) else part.suffix
                    hasher.update(suffix.encode() + hashlib.file_digest(handle, "sha256").digest())
        return hasher.hexdigest()

    @property
    def _is_saved_dataset(self) -> bool:
        files = self.files
        return len(files) == 1 and files[0].is_dir()

    def chunks(self) -> Iterator[TextChunk]:
        """Yield the text of all documents in order.

        Raises:
            DataError: something cannot be read as text; the message names the file and the line, row or byte.
        """
        if self.path.startswith(HUB):
            yield from self._read_hub()
        for is_table, files in groupby(self.files, lambda file: file.is_dir() or file.suffix in TABLES):
            if is_table:
                yield from self._read_tables([_split_folder(file, self.split) for file in files])
            else:
                for file in files:
                    yield from self._read_text_files(file)

    def _read_text_files(self, file: Path) -> Iterator[TextChunk]:
        if data_suffix(file) == ".json" and is_array(file):
            yield from read_json_array(file, self.text_field, self.max_document_bytes)
        elif data_suffix(file) in (".jsonl", ".json"):
            yield from read_json_lines(file, self.text_field, self.max_document_bytes)
        else:
            yield from read_text_file(file)

    def _read_tables(self, files: list[Path]) -> Iterator[TextChunk]:
        for row in read_table_rows(files, self.text_field, self.max_document_bytes):
            text = validate_text(row.text, row.where, self.text_field)
            yield from split_document(text, len(text))

    def _read_hub(self) -> Iterator[TextChunk]:
        try:
            for number, row in enumerate(_load_hub_dataset(self.path, self.split), start=1):
                where = f"{self.path}: row {number}"
                if self.text_field not in row:
                    available = ", ".join(f"'{key}'" for key in row)
                    raise DataError(f"{where}: no field '{self.text_field}', only {available}. Set data.text_field")
                text = validate_text(row[self.text_field], where, self.text_field)
                if len(text) > self.max_document_bytes:
                    raise document_too_large(where, len(text.encode()), self.max_document_bytes)
                yield from split_document(text, len(text))
        except (DataError, ConfigError):
            raise
        except Exception as error:  # pyarrow, pandas and fsspec raise many types on damaged files
            cause = error.__cause__ or error
            first = first_line(cause)
            raise DataError(f"{self.path}: cannot be read: {first}") from error


def stdlib_files(split: Split) -> list[Path]:
    """Return the modules of the standard library, split into train and validation by a hash of their path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _EXCLUDED_FOLDERS]  # site-packages may have 100,000 files
        modules += [Path(folder, name) for name in names if name.endswith(".py")]
    files = []
    for file in sorted(modules):
        held_out = zlib.crc32(file.relative_to(root).as_posix().encode()) % 100 < _VALIDATION_PERCENT
        if held_out == (split == "validation") and file.stat().st_size:
            files.append(file)
    return files


def _split_folder(file: Path, split: Split) -> Path:
    """Return the subdirectory of a split if `file` is a saved dataset with several splits, else `file` itself.

    Raises:
        ConfigError: the dataset lacks the split.
    """
    if not file.is_dir() or not has_dataset_splits(file):
        return file
    try:
        splits = [str(name) for name in strict_json.read(file / "dataset_dict.json")["splits"]]
    except (ConfigError, LookupError, TypeError) as error:
        raise DataError(f"{file}: cannot be loaded as a dataset: {error}") from None
    if split not in splits:
        raise ConfigError(Problem(f"data.{split}", f"'{file}' has no split '{split}', only {', '.join(splits)}"))
    return file / split


def _hub_name(path: str) -> tuple[str, str | None]:
    parts = path.removeprefix(HUB).split("/")
    return "/".join(parts[:2]), "/".join(parts[2:]) or None


def _hub_error(path: str, error: Exception) -> ConfigError:
    first = first_line(error)
    return ConfigError(
        Problem(
            "data",
            f"'{path}' cannot be loaded from the hub: {first}",
            "Check the name and the network, or use local files",
        )
    )


@functools.cache
def _hub_revision(path: str) -> str:
    """Return the current commit of a dataset, so that a changed dataset is tokenized again."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(_hub_name(path)[0], timeout=30).sha)
    except Exception as error:
        raise _hub_error(path, error) from None


def _load_hub_dataset(path: str, split: Split) -> Iterable[Mapping[str, object]]:
    import datasets

    name, configuration = _hub_name(path)
    revision = _hub_revision(path)
    try:
        rows: Iterable[Mapping[str, object]] = datasets.load_dataset(
            name, configuration, split=split, streaming=True, revision=revision
        )
    except Exception as error:
        raise _hub_error(path, error) from None
    return rows
