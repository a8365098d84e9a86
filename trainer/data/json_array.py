"""Streaming reader of .json files that hold one array of objects."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from trainer.data.compressed import open_decompressed
from trainer.errors import DataError
from trainer.units import format_bytes

_CHUNK_BYTES = 1 << 20
_WHITESPACE = " \t\r\n"
_decoder = json.JSONDecoder()


@dataclass(frozen=True)
class Element:
    """One element of the array."""

    where: str
    """File, line and element number, for error messages."""

    value: object
    size: int
    """Length in the file, in characters."""


def is_array(file: Path) -> bool:
    """Return whether the file holds an array, by its first character.

    Raises:
        DataError: it begins with neither an array nor an object.
    """
    with open_decompressed(file) as handle:
        first = Scanner(file, handle, _CHUNK_BYTES).peek()
    if first not in ("", "[", "{"):
        raise DataError(f"{file}: line 1: expected an array of objects, or one object a line (got {first!r})")
    return first == "["


def read_elements(file: Path, max_characters: int) -> Iterator[Element]:
    """Yield the elements of the array in `file`; memory holds one of them and the read-ahead.

    Args:
        file: may be compressed.
        max_characters: limit on the length of an element.

    Raises:
        DataError: the file is not a JSON array; the message names the line.
    """
    with open_decompressed(file) as handle:
        text = Scanner(file, handle, max_characters)
        text.expect("[")
        number, separator = 0, text.peek()
        if separator == "]":
            text.expect("]")
        while separator != "]":
            number += 1
            yield text.read_element(number)
            separator = text.expect(",]")
        if rest := text.peek():
            raise DataError(f"{file}: line {text.line()}: {rest!r} after the end of the array")


class Scanner:
    """Decoded text of a file from the current position; reads more bytes on demand."""

    def __init__(self, file: Path, handle: BinaryIO, max_characters: int) -> None:
        """Start at the beginning of an open file.

        Args:
            file: its path, for error messages.
            handle: the file, decompressed.
            max_characters: limit on the length of an element.
        """
        self._file, self._handle, self._max_characters = file, handle, max_characters
        self._decode = codecs.getincrementaldecoder("utf-8")()
        self._text, self._position = "", 0
        self._lines = self._counted = 0
        """Number of line ends before position `_counted` of `_text`."""

    @property
    def buffer_size(self) -> int:
        """Number of decoded characters in memory."""
        return len(self._text)

    def line(self, position: int | None = None) -> int:
        """Return the line number of the current position, or of `position` in the buffer.

        Positions must not decrease between calls, so that each character is counted once.
        """
        position = self._position if position is None else position
        self._lines += self._text.count("\n", self._counted, position)
        self._counted = position
        return 1 + self._lines

    def _read(self, size: int) -> bool:
        """Read up to `size` more bytes; return False at the end of the file."""
        raw = self._handle.read(size)
        self.line()
        self._text, self._position, self._counted = self._text[self._position :], 0, 0
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
        """Return the next character that is not whitespace, without consuming it; empty at the end of the file."""
        while True:
            while self._position < len(self._text) and self._text[self._position] in _WHITESPACE:
                self._position += 1
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._read(_CHUNK_BYTES):
                return ""

    def expect(self, characters: str) -> str:
        """Consume one of these characters and return it."""
        next_character = self.peek()
        if not next_character or next_character not in characters:
            wanted = " or ".join(repr(character) for character in characters)
            actual = repr(next_character) if next_character else "the end of the file"
            raise DataError(f"{self._file}: line {self.line()}: not a JSON array: expected {wanted} (got {actual})")
        self._position += 1
        return next_character

    def read_element(self, number: int) -> Element:
        """Consume one value.

        While the value is incomplete, the buffer is doubled and parsed again from the start of the value, so the total
        time is linear in its length.
        """
        self.peek()
        while True:
            where = f"{self._file}: line {self.line()} (element {number})"
            try:
                value, end = _decoder.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                if len(self._text) - self._position > self._max_characters:
                    raise DataError(f"{where}: not JSON, or longer than {format_bytes(self._max_characters)}") from None
                if not self._read(max(_CHUNK_BYTES, len(self._text) - self._position)):
                    line = self.line(error.pos)
                    raise DataError(f"{self._file}: line {line} (element {number}): not JSON: {error.msg}") from None
            except RecursionError:
                raise DataError(f"{where}: nested too deep") from None
            except ValueError as error:
                raise DataError(f"{where}: not JSON: {error}") from None
            else:
                size, self._position = end - self._position, end
                return Element(where, value, size)
