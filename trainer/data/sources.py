"""Where text comes from: files of several kinds, folders, the hub, and the standard library's own source."""

from __future__ import annotations

import functools
import hashlib
import json
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from trainer.config.paths import (
    BUILTIN,
    HUB,
    compression_of,
    is_saved_dataset,
    kind_of,
    matching_files,
    only_tokens,
)
from trainer.data.compressed import open_bytes
from trainer.data.json_array import elements, is_array
from trainer.errors import ConfigError, DataError, Problem

Split = Literal["train", "validation"]

_CHUNK_BYTES = 1 << 20
_LARGEST_ELEMENT = 64_000_000
"""Characters of an element of a .json array."""
_TABLES = (".parquet", ".csv", ".arrow")
_HELD_OUT_OF_100 = 5
_LEFT_OUT = ("site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "turtledemo")


@dataclass(frozen=True)
class Piece:
    """Part of a document. Long text files come in pieces so that no file has to fit in memory."""

    text: str
    ends: bool
    """Whether the document ends with this piece."""

    size: int
    """Bytes (of files) or characters (of tables) that this piece stands for; progress is counted in them."""


@dataclass(frozen=True)
class Source:
    """One entry of `data.train` or `data.validation`, resolved to what there is to read."""

    path: str
    split: Split
    text_field: str

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
        if not files or any(f.is_dir() or f.suffix in _TABLES or compression_of(f) for f in files):
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
            yield from self._rows(_from_hub(self.path, self.split), self.path)
        for file in self.files:
            if file.is_dir():
                yield from self._rows(_from_disk(file, self.split), str(file))
            elif kind_of(file) == ".json" and is_array(file):
                yield from _json_elements(file, self.text_field)
            elif kind_of(file) in (".jsonl", ".json"):
                yield from _json_lines(file, self.text_field)
            elif file.suffix in _TABLES:
                yield from self._rows(_from_table(file), str(file))
            else:
                yield from _text(file)

    def _rows(self, rows: Any, where: str) -> Iterator[Piece]:
        try:
            for number, row in enumerate(rows, start=1):
                if self.text_field not in row:
                    have = ", ".join(f"'{key}'" for key in row)
                    raise DataError(f"{where}: row {number} has no field '{self.text_field}', only {have}")
                text = _as_text(row[self.text_field], f"{where}: row {number}", self.text_field)
                yield Piece(text, True, len(text))
        except DataError:
            raise
        except Exception as error:  # whatever pyarrow, pandas and fsspec raise on damaged files
            cause = error.__cause__ or error
            first = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            raise DataError(f"{where}: cannot be read: {first}") from error


def stdlib_files(split: Split) -> list[Path]:
    """The standard library's own modules, divided into train and validation by the file's name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if any(part in _LEFT_OUT for part in name.parts):
            continue
        held_out = zlib.crc32(name.as_posix().encode()) % 100 < _HELD_OUT_OF_100
        if held_out == (split == "validation") and file.stat().st_size:
            files.append(file)
    return files


def _decode(raw: bytes, file: Path, first_line: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        raise DataError(
            f"{file}: line {line}: not UTF-8 (byte 0x{raw[error.start]:02x}). Convert the file to UTF-8"
        ) from None


def _text(file: Path) -> Iterator[Piece]:
    """A text file is one document, in pieces that end at line ends."""
    with open_bytes(file) as handle:
        line = 1
        while lines := handle.readlines(_CHUNK_BYTES):
            raw = b"".join(lines)
            yield Piece(_decode(raw, file, line), False, len(raw))
            line += len(lines)
    yield Piece("", True, 0)


def _json_elements(file: Path, text_field: str) -> Iterator[Piece]:
    for element in elements(file, _LARGEST_ELEMENT):
        yield Piece(_text_of_row(element.value, element.where, text_field), True, element.size)


def _json_lines(file: Path, text_field: str) -> Iterator[Piece]:
    with open_bytes(file) as handle:
        for number, raw in enumerate(handle, start=1):
            line = _decode(raw, file, number)
            if not line.strip():
                continue
            yield Piece(_text_of(line, f"{file}: line {number}", text_field), True, len(raw))


def _text_of(line: str, where: str, text_field: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    return _text_of_row(row, where, text_field)


def _text_of_row(row: object, where: str, text_field: str) -> str:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
    if text_field not in row:
        have = ", ".join(f"'{key}'" for key in islice(row, 10)) or "nothing"
        raise DataError(f"{where}: no field '{text_field}', only {have}. Set data.text_field")
    return _as_text(row[text_field], where, text_field)


def _as_text(value: object, where: str, text_field: str) -> str:
    """The text that a row holds; null is no text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: field '{text_field}' holds {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half a surrogate pair at character {error.start}, which is no text") from None
    return value


def _from_table(file: Path) -> Any:
    """A streaming dataset over one file: nothing is copied to another cache."""
    import datasets

    if file.stat().st_size == 0:
        raise DataError(f"{file}: the file is empty")
    kind = file.suffix.removeprefix(".")
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it would print what we raise
    try:
        return datasets.load_dataset(kind, data_files=str(file), split="train", streaming=True)
    except Exception as error:
        raise DataError(f"{file}: not a {kind} file: {str(error).strip().splitlines()[0]}") from error


def _from_disk(folder: Path, split: Split) -> Any:
    import datasets

    assert is_saved_dataset(folder)
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(f"{folder}: not a dataset that can be loaded: {str(error).splitlines()[0]}") from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            have = ", ".join(found)
            raise ConfigError(Problem(f"data.{split}", f"'{folder}' has no split '{split}', only {have}"))
        found = found[split]
    return found


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
