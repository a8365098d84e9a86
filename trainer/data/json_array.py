"""Reads a .json file: an array of objects, one element after the other, or one object a line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from trainer.data.compressed import open_bytes
from trainer.errors import DataError
from trainer.units import format_bytes

_CHUNK_BYTES = 1 << 20
_SPACE = " \t\r\n"
_decoder = json.JSONDecoder()


@dataclass(frozen=True)
class Element:
    """An element of the array."""

    where: str
    """File, line and number, for messages."""

    value: Any
    size: int
    """Characters that it takes in the file."""


def is_array(file: Path) -> bool:
    """Whether the file holds an array: its first character is a bracket.

    Raises:
        DataError: it begins with neither an array nor an object.
    """
    with open_bytes(file) as handle:
        first = _Text(file, handle, _CHUNK_BYTES).peek()
    if first not in ("", "[", "{"):
        raise DataError(f"{file}: line 1: expected an array of objects, or one object a line (got {first!r})")
    return first == "["


def elements(file: Path, largest: int) -> Iterator[Element]:
    """The elements of the array in `file`. No more than one of them is in memory, and what has been read ahead.

    Args:
        largest: characters of an element at most.

    Raises:
        DataError: naming file and line, for what is no JSON array.
    """
    with open_bytes(file) as handle:
        text = _Text(file, handle, largest)
        text.expect("[")
        number, separator = 0, text.peek()
        if separator == "]":
            text.expect("]")
        while separator != "]":
            number += 1
            yield text.element(number)
            separator = text.expect(",]")
        if rest := text.peek():
            raise DataError(f"{file}: line {text.line()}: {rest!r} after the end of the array")


class _Text:
    """Characters of a file, from the current position on."""

    def __init__(self, file: Path, handle: BinaryIO, largest: int) -> None:
        self._file, self._handle, self._largest = file, handle, largest
        self._decode = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at = "", 0
        self._lines = self._counted = 0
        """Line ends before position `_counted` of `_text`."""

    def line(self, at: int | None = None) -> int:
        """Number of the line at the current position, or at position `at` of what is in memory; `at` is no smaller than
        in the call before, so that each character is looked at once."""
        at = self._at if at is None else at
        self._lines += self._text.count("\n", self._counted, at)
        self._counted = at
        return 1 + self._lines

    def _read(self, size: int) -> bool:
        """Read so many bytes more. False at the end of the file."""
        raw = self._handle.read(size)
        self.line()
        self._text, self._at, self._counted = self._text[self._at :], 0, 0
        try:
            self._text += self._decode.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            line = self.line(len(self._text)) + error.object.count(b"\n", 0, error.start)
            byte = error.object[error.start]
            raise DataError(
                f"{self._file}: line {line}: not UTF-8 (byte 0x{byte:02x}). Convert the file to UTF-8"
            ) from None
        return bool(raw)

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read(_CHUNK_BYTES):
                return ""

    def expect(self, characters: str) -> str:
        """Pass one of these characters, and return it."""
        found = self.peek()
        if not found or found not in characters:
            wanted = " or ".join(repr(character) for character in characters)
            shown = repr(found) if found else "the end of the file"
            raise DataError(f"{self._file}: line {self.line()}: not a JSON array: expected {wanted} (got {shown})")
        self._at += 1
        return found

    def element(self, number: int) -> Element:
        """Pass one value. Where it is incomplete, as much again is read as there is, so that the time is linear."""
        self.peek()
        while True:
            where = f"{self._file}: line {self.line()} (element {number})"
            try:
                value, end = _decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if len(self._text) - self._at > self._largest:
                    raise DataError(f"{where}: not JSON, or longer than {format_bytes(self._largest)}") from None
                if not self._read(max(_CHUNK_BYTES, len(self._text) - self._at)):
                    line = self.line(error.pos)
                    raise DataError(f"{self._file}: line {line} (element {number}): not JSON: {error.msg}") from None
            except RecursionError:
                raise DataError(f"{where}: nested too deep") from None
            except ValueError as error:
                raise DataError(f"{where}: not JSON: {error}") from None
            else:
                size, self._at = end - self._at, end
                return Element(where, value, size)
