"""Opens text files for reading, decompressed as they are read."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from trainer.config.paths import compression_of
from trainer.errors import DataError, first_line

_BUFFER_BYTES = 1 << 20


def _open_zstandard(raw: BinaryIO) -> Any:
    import pyarrow  # here, because it takes longer to load than a small file

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")


_DECOMPRESSORS: Mapping[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw, mode="rb"),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _open_zstandard,
}


class DecompressedFile(io.RawIOBase):
    """The decompressed bytes of a file. Frames that follow one another are read as one stream."""

    def __init__(self, path: Path, compression: str) -> None:
        self._path, self._file = path, path.open("rb")
        self._stream = _DECOMPRESSORS[compression](self._file)
        self._lines = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase`.

        Raises:
            DataError: the file is damaged or truncated, with the line up to which it can be read.
        """
        try:
            data = self._stream.read1(len(buffer))  # `read` would lose what it has when it fails
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            first = first_line(error)
            raise DataError(
                f"{self._path}: line {self._lines + 1}: cannot be decompressed: {first}. The file is damaged, "
                "truncated, or not what its name says"
            ) from None
        self._lines += data.count(b"\n")
        buffer[: len(data)] = data
        return len(data)

    @property
    def read_bytes(self) -> int:
        """Bytes of the compressed file that have been read."""
        return self._file.tell()

    def close(self) -> None:
        self._stream.close()
        self._file.close()
        super().close()


def open_decompressed(path: Path) -> BinaryIO:
    """The content of a file, decompressed where its name says that it is compressed."""
    compression = compression_of(path)
    if not compression:
        return path.open("rb")
    return io.BufferedReader(DecompressedFile(path, compression), _BUFFER_BYTES)
