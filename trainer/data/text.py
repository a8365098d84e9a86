"""Documents of text files, in pieces that are small enough to tokenize."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from trainer.data.compressed import open_bytes
from trainer.data.json_array import elements
from trainer.errors import DataError

_PIECE_SIZE = 1 << 20
"""Bytes or characters of a piece, about."""

_SEARCHED = 1 << 16
"""Bytes or characters before the end of a piece in which a place to cut is looked for."""

_SPACE = re.compile(r"(?<=\S) (?=\S)")
"""A single space, before which most tokenizers begin a token wherever they cut."""

_SPACE_BYTE = re.compile(_SPACE.pattern.encode())


@dataclass(frozen=True)
class Piece:
    """Part of a document. Long documents come in pieces, because a tokenizer takes 150 times the memory of its text."""

    text: str
    ends: bool
    """Whether the document ends with this piece."""

    size: int
    """Bytes (of files) or characters (of tables) that this piece stands for; progress is counted in them."""


def pieces_of(text: str, size: int) -> Iterator[Piece]:
    """A document that is in memory, in pieces.

    Args:
        size: of the document in its file, see `Piece.size`.
    """
    start = 0
    while len(text) - start > 2 * _PIECE_SIZE:
        end = start + _PIECE_SIZE
        window = text[end - min(_SEARCHED, _PIECE_SIZE // 2) : end + 1]
        spaces = [match.start() for match in _SPACE.finditer(window)]
        cut = end - len(window) + 1 + spaces[-1] if spaces else end
        yield Piece(text[start:cut], False, cut - start)
        start = cut
    yield Piece(text[start:], True, max(0, size - start))


def plain_text(file: Path) -> Iterator[Piece]:
    """A text file as one document. Pieces end at line ends, or within lines that are longer than a piece."""
    with open_bytes(file) as handle:
        line, rest = 1, b""
        while True:
            raw, size = [rest], 0
            while size <= _PIECE_SIZE and (part := handle.readline(_PIECE_SIZE)):
                raw.append(part)
                size += len(part)
            whole = b"".join(raw)
            if not size:
                break
            is_line = raw[-1].endswith(b"\n") or len(raw[-1]) < _PIECE_SIZE
            cut = len(whole) if is_line else _cut_within_line(whole)
            yield Piece(decode(whole[:cut], file, line), False, cut)
            line, rest = line + whole.count(b"\n", 0, cut), whole[cut:]
        if rest:
            yield Piece(decode(rest, file, line), False, len(rest))
    yield Piece("", True, 0)


def _cut_within_line(raw: bytes) -> int:
    """Where to cut a piece that ends within a line: before a single space, or else between two characters."""
    first = max(1, len(raw) - _SEARCHED)
    places = [match.start() for match in _SPACE_BYTE.finditer(raw, first)]
    if places:
        return places[-1]
    cut = len(raw) - 1
    while cut > len(raw) - 5 and raw[cut] & 0xC0 == 0x80:  # within a character of UTF-8
        cut -= 1
    return cut


def json_elements(file: Path, text_field: str, largest: int) -> Iterator[Piece]:
    """The documents of a .json array; see `json_lines`."""
    for element in elements(file, largest):
        if element.size > largest:
            raise too_large(element.where, element.size, largest)
        yield from pieces_of(text_of_row(element.value, element.where, text_field), element.size)


def json_lines(file: Path, text_field: str, largest: int) -> Iterator[Piece]:
    """The documents of a .jsonl file, one a line.

    Args:
        largest: bytes of a line at most.

    Raises:
        DataError: naming file and line.
    """
    with open_bytes(file) as handle:
        number = 0
        while raw := handle.readline(largest + 1):
            number += 1
            where = f"{file}: line {number}"
            if len(raw.rstrip(b"\r\n")) > largest:
                raise too_large(where, None, largest)
            line = decode(raw, file, number)
            size = len(raw)
            del raw
            if line.strip():
                yield from pieces_of(_text_of(line, where, text_field), size)


def decode(raw: bytes, file: Path, first_line: int) -> str:
    """Raises: DataError, naming the line, for what is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        raise DataError(
            f"{file}: line {line}: not UTF-8 (byte 0x{raw[error.start]:02x}). Convert the file to UTF-8"
        ) from None


def _text_of(line: str, where: str, text_field: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:  # an integer of more than 4,300 digits
        raise DataError(f"{where}: not JSON that can be read: {error}") from None
    except RecursionError:
        raise DataError(f"{where}: nested too deep") from None
    return text_of_row(row, where, text_field)


def text_of_row(row: object, where: str, text_field: str) -> str:
    """The text of a row of JSON.

    Raises:
        DataError: it holds none.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
    if text_field not in row:
        have = ", ".join(f"'{key}'" for key in islice(row, 10)) or "nothing"
        raise DataError(f"{where}: no field '{text_field}', only {have}. Set data.text_field")
    return as_text(row[text_field], where, text_field)


def as_text(value: object, where: str, text_field: str) -> str:
    """The text that a row holds; null is no text.

    Raises:
        DataError: it is of another type, or not Unicode.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: field '{text_field}' holds {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half a surrogate pair at character {error.start}, which is no text") from None
    return value


def too_large(where: str, size: int | None, largest: int) -> DataError:
    """The error of a document of more than `largest` bytes.

    Args:
        where: file and line or row. size: in bytes; None where not all of it was read.
    """
    found = f"more than {largest:,}" if size is None else f"{size:,}"
    return DataError(
        f"{where}: a document of {found} bytes; data.max_document_bytes allows {largest:,}. Divide it, or raise the "
        "limit: memory grows with it"
    )
