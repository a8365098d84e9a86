r"""Token files in Megatron's indexed format: `NAME.bin` holds the ids, `NAME.idx` the extent of each document.

Layout of the index, little-endian (Megatron-LM, `megatron/core/datasets/indexed_dataset.py`):
9 bytes `MMIDIDX\0\0`; u64 version = 1; u8 code of the id type; u64 number of sequences S; u64 number of document
boundaries D; i32[S] lengths in tokens; i64[S] offsets in bytes; i64[D] boundaries, in sequences, from 0 to S.
Files written here have one sequence per document, so D = S + 1.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from trainer.errors import DataError

TokenIds = npt.NDArray[np.integer[Any]]
"""Ids of an unsigned 16-bit or signed 32-bit type, as stored."""

_MAGIC = b"MMIDIDX\x00\x00"
_DTYPE_CODES: dict[int, type[np.integer[Any]]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_HEADER = struct.Struct("<QBQQ")
_MAX_DOCUMENT_TOKENS = 2**31 - 1
_FINGERPRINT_SAMPLE = 1 << 16
"""Values that a fingerprint reads at each of its 16 positions."""


def id_type(vocabulary: int) -> type[np.uint16] | type[np.int32]:
    """Return the smallest id type that Megatron uses for a vocabulary of this size."""
    return np.uint16 if vocabulary < 65500 else np.int32


class IndexedWriter:
    """Writes documents, each in any number of parts; `close` writes the index."""

    def __init__(self, prefix: Path, dtype: type[np.uint16] | type[np.int32]) -> None:
        """Create `prefix.bin`."""
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        self._bin = prefix.with_suffix(".bin").open("wb")
        self._lengths: list[int] = []
        self.open_length = 0
        """Number of ids in the open document."""

    def extend(self, ids: Sequence[int]) -> None:
        """Append ids to the open document.

        Raises:
            DataError: the document exceeds the 32-bit length of the index.
        """
        self.open_length += len(ids)
        if self.open_length > _MAX_DOCUMENT_TOKENS:
            raise DataError(f"{self._prefix}.bin: more than {_MAX_DOCUMENT_TOKENS:,} tokens in one document. Divide it")
        self._bin.write(np.asarray(ids, dtype=self._dtype).tobytes())

    def end(self) -> None:
        """End the open document."""
        self._lengths.append(self.open_length)
        self.open_length = 0

    def add(self, ids: Sequence[int]) -> None:
        """Append a complete document."""
        self.extend(ids)
        self.end()

    def close(self) -> None:
        """Close `prefix.bin` and write `prefix.idx`."""
        self._bin.close()
        lengths = np.asarray(self._lengths, dtype=np.int32)
        ends = np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
        offsets = np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: len(lengths)]
        code = next(code for code, dtype in _DTYPE_CODES.items() if np.dtype(dtype) == self._dtype)
        with self._prefix.with_suffix(".idx").open("wb") as index:
            index.write(_MAGIC + _HEADER.pack(1, code, len(lengths), len(lengths) + 1))
            for array in (lengths, offsets, np.arange(len(lengths) + 1, dtype=np.int64)):
                index.write(array.tobytes())

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        with contextlib.suppress(OSError):  # flushing to a full disk fails again
            self._bin.close()


class IndexedTokens:
    """Random access to documents through a memory map."""

    lengths: npt.NDArray[np.int32]
    """Number of ids of each document."""

    offsets: npt.NDArray[np.int64]
    """Position of each document in `ids`, in bytes."""

    ids: TokenIds
    """Ids of the file, memory-mapped."""

    def __init__(self, prefix: Path) -> None:
        """Open `prefix.bin` and `prefix.idx`.

        Raises:
            DataError: a file is damaged, or they do not belong together.
        """
        self.bin_path = prefix.with_suffix(".bin")
        self.idx_path = prefix.with_suffix(".idx")
        self._read_index()
        self._check_bin()
        size = self.bin_path.stat().st_size
        self.ids = np.memmap(self.bin_path, dtype=self._dtype, mode="r") if size else np.empty(0, self._dtype)

    def _read_index(self) -> None:
        try:
            raw = self.idx_path.read_bytes()
        except OSError as error:
            raise DataError(f"{self.idx_path}: cannot be read: {error.strerror}") from None
        if raw[:9] != _MAGIC:
            raise DataError(f"{self.idx_path}: not a Megatron index (got {raw[:9]!r} as its first bytes)")
        if len(raw) < 9 + _HEADER.size:
            raise DataError(f"{self.idx_path}: truncated inside its header ({len(raw)} bytes)")
        version, code, sequences, borders = _HEADER.unpack_from(raw, 9)
        if version != 1 or code not in _DTYPE_CODES:
            raise DataError(f"{self.idx_path}: unknown version or id type (got {version} and {code})")
        expected = 9 + _HEADER.size + 12 * sequences + 8 * borders
        if len(raw) < expected:
            raise DataError(f"{self.idx_path}: truncated: {len(raw)} bytes of {expected}")
        self._dtype = np.dtype(_DTYPE_CODES[code])
        offset = 9 + _HEADER.size
        self.lengths = np.frombuffer(raw, "<i4", sequences, offset)
        self.offsets = np.frombuffer(raw, "<i8", sequences, offset + 4 * sequences)
        self._check_borders(np.frombuffer(raw, "<i8", borders, offset + 12 * sequences))

    def _check_borders(self, borders: npt.NDArray[np.int64]) -> None:
        """Check that the document boundaries are ascending and span all sequences."""
        sequences = len(self.lengths)
        if len(borders) < 1 or borders[0] != 0 or borders[-1] != sequences or (np.diff(borders) < 0).any():
            raise DataError(
                f"{self.idx_path}: its {len(borders):,} document boundaries do not ascend from 0 to {sequences:,} "
                "sequences: damaged"
            )

    def _check_bin(self) -> None:
        try:
            size = self.bin_path.stat().st_size
        except OSError as error:
            raise DataError(f"{self.bin_path}: cannot be read: {error.strerror}") from None
        if size % self._dtype.itemsize:
            raise DataError(f"{self.bin_path}: {size} bytes is not a whole number of {self._dtype} ids")
        if not len(self.lengths):
            return
        if int(self.lengths.min()) < 0 or int(self.offsets.min()) < 0 or (self.offsets % self._dtype.itemsize).any():
            raise DataError(f"{self.idx_path}: negative lengths, or offsets between two ids: damaged")
        is_within = self.offsets <= size  # excludes offsets whose sum with a length overflows
        last = int((self.offsets + self.lengths.astype(np.int64) * self._dtype.itemsize)[is_within].max(initial=0))
        if not is_within.all() or last > size:
            largest = max(last, int(self.offsets.max()))
            raise DataError(
                f"{self.bin_path}: {size} bytes, but {self.idx_path.name} points to byte {largest}: "
                "truncated, or not the files of one pair"
            )
        if last < size:
            raise DataError(
                f"{self.bin_path}: {size} bytes, of which {self.idx_path.name} describes only {last}: not the files of "
                "one pair"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def fingerprint(self) -> str:
        """Return the xxh3-128 of the number of documents and ids and of samples of the lengths and ids.

        It does not depend on the path, and takes constant time.
        """
        hashed = xxhash.xxh3_128(f"{len(self)} {len(self.ids)} {self.ids.dtype}".encode())
        for values in (self.lengths, self.ids):
            for start in np.linspace(0, max(0, len(values) - _FINGERPRINT_SAMPLE), num=16, dtype=np.int64):
                hashed.update(values[start : start + _FINGERPRINT_SAMPLE].tobytes())
        return hashed.hexdigest()

    @property
    def tokens(self) -> int:
        """Total number of ids of all documents."""
        return int(self.lengths.sum(dtype=np.int64))

    def document(self, number: int, limit: int | None = None) -> TokenIds:
        """Return the ids of document `number`, truncated to `limit`."""
        start = int(self.offsets[number]) // self.ids.dtype.itemsize
        length = int(self.lengths[number])
        return self.ids[start : start + (length if limit is None else min(length, limit))]

    def stream(self, start: int, length: int) -> TokenIds:
        """Return `length` ids, fewer at the end, from position `start` of the concatenated documents."""
        return self.ids[start : start + length]

    @property
    def is_contiguous(self) -> bool:
        """Whether the documents are stored in order without gaps, which `stream` requires."""
        ends = np.cumsum(self.lengths, dtype=np.int64) * self.ids.dtype.itemsize
        return bool(len(ends) == 0 or (self.offsets[0] == 0 and np.array_equal(self.offsets[1:], ends[:-1])))
