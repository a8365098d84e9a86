"""Streaming decompression of text files."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from trainer.config.paths import compression_of
from trainer.errors import DataError, first_line

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_BUFFER_BYTES = 1 << 20


class _Stream(Protocol):
    def read1(self, size: int = ..., /) -> bytes: ...

    def close(self) -> None: ...


def _open_zstandard(raw: BinaryIO) -> _Stream:
    import pyarrow  # deferred, because the import takes longer than reading a small file

    stream: _Stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
    return stream


_DECOMPRESSORS: Mapping[str, Callable[[BinaryIO], _Stream]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw, mode="rb"),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _open_zstandard,
}


class DecompressedFile(io.RawIOBase):
    """Decompressed bytes of a file; concatenated frames are read as one stream."""

    def __init__(self, path: Path, compression: str) -> None:
        self._path, self._file = path, path.open("rb")
        self._stream = _DECOMPRESSORS[compression](self._file)
        self._lines = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Read up to `len(buffer)` bytes. See `io.RawIOBase`.

        Raises:
            DataError: the file is damaged or truncated; the message names the first unreadable line.
        """
        view = memoryview(buffer)
        try:
            data = self._stream.read1(len(view))  # `read` loses the bytes before the damage
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            first = first_line(error)
            raise DataError(
                f"{self._path}: line {self._lines + 1}: cannot be decompressed: {first}. The file is damaged, "
                "truncated, or not what its name says"
            ) from None
        self._lines += data.count(b"\n")
        view[: len(data)] = data
        return len(data)

    @property
    def read_bytes(self) -> int:
        """Number of compressed bytes that have been read."""
        return self._file.tell()

    def close(self) -> None:
        self._stream.close()
        self._file.close()
        super().close()


def open_decompressed(path: Path) -> BinaryIO:
    """Open a file for reading; decompress it if its name has the suffix of a compression."""
    compression = compression_of(path)
    if not compression:
        return path.open("rb")
    return io.BufferedReader(DecompressedFile(path, compression), _BUFFER_BYTES)
