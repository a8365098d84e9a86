"""Read the documents of text files, in chunks that are small enough to tokenize."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from trainer.data.compressed import open_decompressed
from trainer.data.json_array import read_elements
from trainer.errors import DataError

_CHUNK_SIZE = 1 << 20
"""Approximate size of a chunk, in bytes or characters."""

_BOUNDARY_WINDOW = 1 << 16
"""Bytes or characters before the end of a chunk that are searched for a position to split at."""

_SINGLE_SPACE = re.compile(r"(?<=\S) (?=\S)")
"""A single space between two words: most tokenizers start a token there, so splitting before it changes no ids."""

_SINGLE_SPACE_BYTE = re.compile(_SINGLE_SPACE.pattern.encode())


@dataclass(frozen=True)
class TextChunk:
    """Part of a document. Long documents are split, because tokenization takes 150 times the memory of the text."""

    text: str
    is_last: bool
    """True for the last chunk of a document."""

    size: int
    """Bytes (in files) or characters (in tables) of the source that this chunk accounts for, to report progress."""


def split_document(text: str, size: int) -> Iterator[TextChunk]:
    """Split a document that is in memory into chunks.

    Args:
        text: the document.
        size: size of the document in its file, see `TextChunk.size`.
    """
    start = 0
    while len(text) - start > 2 * _CHUNK_SIZE:
        end = start + _CHUNK_SIZE
        window = text[end - min(_BOUNDARY_WINDOW, _CHUNK_SIZE // 2) : end + 1]
        spaces = [match.start() for match in _SINGLE_SPACE.finditer(window)]
        cut = end - len(window) + 1 + spaces[-1] if spaces else end
        yield TextChunk(text[start:cut], False, cut - start)
        start = cut
    yield TextChunk(text[start:], True, max(0, size - start))


def read_text_file(file: Path) -> Iterator[TextChunk]:
    """Read a text file as one document, split at line ends, or within lines that are longer than a chunk."""
    with open_decompressed(file) as handle:
        line, remainder = 1, b""
        while True:
            raw, size = [remainder], 0
            while size <= _CHUNK_SIZE and (part := handle.readline(_CHUNK_SIZE)):
                raw.append(part)
                size += len(part)
            joined = b"".join(raw)
            if not size:
                break
            is_at_line_end = raw[-1].endswith(b"\n") or len(raw[-1]) < _CHUNK_SIZE
            cut = len(joined) if is_at_line_end else _cut_within_line(joined)
            yield TextChunk(decode_utf8(joined[:cut], file, line), False, cut)
            line, remainder = line + joined.count(b"\n", 0, cut), joined[cut:]
        if remainder:
            yield TextChunk(decode_utf8(remainder, file, line), False, len(remainder))
    yield TextChunk("", True, 0)


def _cut_within_line(raw: bytes) -> int:
    """Find the position to split within a line: before the last single space, or else between two characters."""
    first = max(1, len(raw) - _BOUNDARY_WINDOW)
    spaces = [match.start() for match in _SINGLE_SPACE_BYTE.finditer(raw, first)]
    if spaces:
        return spaces[-1]
    cut = len(raw) - 1
    while cut > len(raw) - 5 and raw[cut] & 0xC0 == 0x80:  # continuation byte of UTF-8
        cut -= 1
    return cut


def read_json_array(file: Path, text_field: str, max_bytes: int) -> Iterator[TextChunk]:
    """Read the documents of a .json array. See `read_json_lines`."""
    for element in read_elements(file, max_bytes):
        if element.size > max_bytes:
            raise document_too_large(element.where, element.size, max_bytes)
        yield from split_document(extract_text(element.value, element.where, text_field), element.size)


def read_json_lines(file: Path, text_field: str, max_bytes: int) -> Iterator[TextChunk]:
    """Read the documents of a .jsonl file, one per line.

    Args:
        file: may be compressed.
        text_field: name of the field that holds the text.
        max_bytes: limit on the length of a line.

    Raises:
        DataError: a line cannot be read as a document; the message names it.
    """
    with open_decompressed(file) as handle:
        number = 0
        while raw := handle.readline(max_bytes + 1):
            number += 1
            where = f"{file}: line {number}"
            if len(raw.rstrip(b"\r\n")) > max_bytes:
                raise document_too_large(where, None, max_bytes)
            line = decode_utf8(raw, file, number)
            size = len(raw)
            del raw
            if line.strip():
                yield from split_document(_parse_line(line, where, text_field), size)


def decode_utf8(raw: bytes, file: Path, first_line: int) -> str:
    """Decode UTF-8.

    Args:
        raw: part of a file.
        file: its path, for the error message.
        first_line: number of the line at which `raw` starts.

    Raises:
        DataError: the bytes are not UTF-8; the message names the line.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        raise DataError(
            f"{file}: line {line}: not UTF-8 (byte 0x{raw[error.start]:02x}). Convert the file to UTF-8"
        ) from None


def _parse_line(line: str, where: str, text_field: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:  # an integer of more than 4,300 digits
        raise DataError(f"{where}: not JSON that can be read: {error}") from None
    except RecursionError:
        raise DataError(f"{where}: nested too deep") from None
    return extract_text(row, where, text_field)


def extract_text(row: object, where: str, text_field: str) -> str:
    """Return the text of a parsed JSON row.

    Raises:
        DataError: it is not an object, lacks the field, or the field is not text.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
    if text_field not in row:
        available = ", ".join(f"'{key}'" for key in islice(row, 10)) or "nothing"
        raise DataError(f"{where}: no field '{text_field}', only {available}. Set data.text_field")
    return validate_text(row[text_field], where, text_field)


def validate_text(value: object, where: str, text_field: str) -> str:
    """Return the value of a text field; null is an empty text.

    Raises:
        DataError: it is of another type, or is not valid Unicode.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: field '{text_field}' holds {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half a surrogate pair at character {error.start}") from None
    return value


def document_too_large(where: str, size: int | None, max_bytes: int) -> DataError:
    """Return the error for a document of more than `max_bytes` bytes.

    Args:
        where: file and line or row.
        size: size in bytes; None if the document was not read to its end.
        max_bytes: `data.max_document_bytes`.
    """
    actual = f"more than {max_bytes:,}" if size is None else f"{size:,}"
    return DataError(
        f"{where}: a document of {actual} bytes; data.max_document_bytes allows {max_bytes:,}. Divide it, or raise the "
        "limit: memory grows with it"
    )
