"""Hold out training documents for validation, selected by the hash of their content.

A document is held out if the 64-bit hash of its content is below `fraction * 2^64`. The selection depends only on the
content: not on the order of documents and files, the number of processes, or the seed. Exact duplicates, also across
sources, fall on the same side of the split.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import xxhash

from trainer.data.documents import TextChunk
from trainer.data.indexed import IndexedTokens, TokenIds
from trainer.data.sources import Source
from trainer.errors import ConfigError, DataError, Problem
from trainer.tasks import TASKS, Task

if TYPE_CHECKING:
    from trainer.config import LoadedConfig
    from trainer.config.schema import DataSection
    from trainer.data.cache import Cache

HASHES = "document_hashes.npy"
"""File next to the token files of a text source: xxh3-64 of the UTF-8 text of each document, in document order."""

Hashes = npt.NDArray[np.uint64]


class DocumentHasher:
    """Computes the hashes of documents that arrive in chunks."""

    def __init__(self) -> None:
        """Open the first document."""
        self._hasher = xxhash.xxh3_64()
        self._hashes: list[int] = []

    def update(self, text: str) -> None:
        """Append text to the open document."""
        self._hasher.update(text.encode())

    def end(self, *, is_written: bool = True) -> int:
        """End the open document and return its hash.

        Args:
            is_written: False for a document that the token files omit, whose hash is not saved.
        """
        content_hash = self._hasher.intdigest()
        self._hasher.reset()
        if is_written:
            self._hashes.append(content_hash)
        return content_hash

    def save(self, folder: Path) -> None:
        """Write the hashes of the written documents to `folder`."""
        np.save(folder / HASHES, np.asarray(self._hashes, np.uint64), allow_pickle=False)


def drop_held_out(chunks: Iterable[TextChunk], fraction: float, limit: int) -> Iterator[TextChunk]:
    """Yield the chunks of the documents that are not held out.

    A document is buffered until its end, when its hash is known; text beyond `limit` characters is dropped.
    """
    hasher, kept, size = DocumentHasher(), list[TextChunk](), 0
    for chunk in chunks:
        hasher.update(chunk.text)
        if size <= limit:
            kept.append(chunk)
            size += len(chunk.text)
        if chunk.is_last:
            if not is_held_out(hasher.end(is_written=False), fraction):
                yield from kept
            kept, size = [], 0


def write_id_hashes(tokens: IndexedTokens, folder: Path) -> None:
    """Write the hashes of tokenized documents to `folder`.

    Ids are hashed as little-endian 32-bit integers, so that the hash does not depend on the id type of the file.
    """
    hashes = np.empty(len(tokens), np.uint64)
    for number in range(len(tokens)):
        hashes[number] = xxhash.xxh3_64_intdigest(tokens.document(number).astype("<i4").tobytes())
    np.save(folder / HASHES, hashes, allow_pickle=False)


def read_hashes(folder: Path, documents: int) -> Hashes:
    """Read the hashes in `folder`.

    Raises:
        DataError: the file is damaged, or does not have `documents` hashes.
    """
    try:
        hashes: Hashes = np.load(folder / HASHES, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{folder / HASHES}: cannot be read: {error}. Delete {folder}") from None
    if hashes.shape != (documents,) or hashes.dtype != np.uint64:
        raise DataError(f"{folder / HASHES}: expected {documents} hashes, got {hashes.shape}. Delete {folder}")
    return hashes


def is_held_out(content_hash: int, fraction: float) -> bool:
    """Return whether the document with this hash is held out."""
    return content_hash < _limit(fraction)


def held_out_mask(hashes: Hashes, fraction: float) -> npt.NDArray[np.bool_]:
    """Return a mask that is True for held-out documents."""
    mask: npt.NDArray[np.bool_] = hashes < np.uint64(_limit(fraction))
    return mask


def _limit(fraction: float) -> int:
    """Return the smallest hash that is not held out, for a fraction in (0, 1)."""
    return min(int(Fraction(str(fraction)) * 2**64), 2**64 - 1)


class DocumentSubset(IndexedTokens):
    """View of some documents of a pair of token files, in their order. No ids are copied."""

    def __init__(self, tokens: IndexedTokens, mask: npt.NDArray[np.bool_]) -> None:
        """Select documents.

        Args:
            tokens: contiguous token files.
            mask: True for the documents of the subset.
        """
        self._parent, self._mask = tokens, mask
        self.bin_path, self.idx_path, self.ids = tokens.bin_path, tokens.idx_path, tokens.ids
        self.lengths, self.offsets = tokens.lengths[mask], tokens.offsets[mask]
        starts = self.offsets // self.ids.dtype.itemsize
        is_first = np.ones(len(starts), np.bool_)
        is_first[1:] = starts[1:] != (starts + self.lengths)[:-1]
        positions = np.cumsum(self.lengths, dtype=np.int64) - self.lengths
        self._segment_starts = starts[is_first]
        """Position in the file of each segment: a maximal run of adjacent documents of the subset."""
        self._segment_positions = positions[is_first]
        """Position of each segment in the stream of the subset."""

    def fingerprint(self) -> str:
        """Return the fingerprint of the parent and a hash of the selection."""
        selection = xxhash.xxh3_128_hexdigest(np.packbits(self._mask).tobytes())
        return f"{self._parent.fingerprint()}-{selection}"

    def stream(self, start: int, length: int) -> TokenIds:
        """Return `length` ids, fewer at the end, from position `start` of the subset's concatenated documents."""
        end, parts = min(start + length, self.tokens), []
        segment = int(np.searchsorted(self._segment_positions, start, side="right")) - 1
        while start < end:
            position = int(self._segment_positions[segment])
            is_last_segment = segment + 1 == len(self._segment_positions)
            stop = end if is_last_segment else min(end, int(self._segment_positions[segment + 1]))
            first = int(self._segment_starts[segment]) + start - position
            parts.append(self.ids[first : first + stop - start])
            start, segment = stop, segment + 1
        return parts[0] if len(parts) == 1 else np.concatenate([self.ids[:0], *parts])

    @property
    def is_contiguous(self) -> bool:
        """Always True: `stream` skips the gaps."""
        return True


def split_held_out(
    loaded: LoadedConfig, cache: Cache, sources: Sequence[Source], train: Sequence[Sequence[IndexedTokens]]
) -> tuple[list[list[IndexedTokens]], list[IndexedTokens]]:
    """Split the training documents by `data.held_out_fraction`.

    Args:
        loaded: the configuration.
        cache: stores the hashes of documents given as token files.
        sources: training sources.
        train: token files of each of `sources`.

    Returns:
        (token files of each source without the held-out documents, token files of the held-out documents).

    Raises:
        ConfigError: a source would have no training documents left, or there would be nothing to validate on.
    """
    data, task = loaded.config.data, TASKS[loaded.config.model.task]
    fraction = data.held_out_fraction
    assert fraction is not None
    key = f"data.validation.{next(n for n, s in enumerate(data.validation) if s.path is None)}.fraction"
    train_parts: list[list[IndexedTokens]] = []
    held_out: list[IndexedTokens] = []
    for source, parts in zip(sources, train, strict=True):
        masks = [held_out_mask(_document_hashes(source, tokens, cache), fraction) for tokens in parts]
        held_out += [DocumentSubset(t, mask) for t, mask in zip(parts, masks, strict=True) if mask.any()]
        train_parts.append([DocumentSubset(t, ~mask) for t, mask in zip(parts, masks, strict=True) if not mask.all()])
        if not train_parts[-1]:
            reason = f"{fraction:g} holds out all {sum(map(len, parts)):,} documents of '{source.path}'"
            remedy = "Set data.validation to separate files (a .txt file is one document)"
            raise ConfigError(Problem(key, reason, remedy))
    usable = [tokens for tokens in held_out if _has_samples(task, tokens, data)]
    if not usable:
        count = f"{sum(len(tokens) for parts in train for tokens in parts):,}"
        problem = "too little for one sample" if held_out else "none"
        reason = f"{fraction:g} of {count} training documents holds out {problem}"
        remedy = "Raise it, or set data.validation to separate files (a .txt file is one document)"
        raise ConfigError(Problem(key, reason, remedy))
    return train_parts, usable


def _document_hashes(source: Source, tokens: IndexedTokens, cache: Cache) -> Hashes:
    """Read the hashes written by tokenization, or hash the ids of a source given as token files."""
    if not source.is_indexed:
        return read_hashes(tokens.bin_path.parent, len(tokens))
    stats = [(path.resolve(), path.stat()) for path in (tokens.bin_path, tokens.idx_path)]
    signature = [HASHES, *([str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats)]
    return read_hashes(
        cache.entry(signature, lambda: signature, "hashes", partial(write_id_hashes, tokens)), len(tokens)
    )


def _has_samples(task: Task, tokens: IndexedTokens, data: DataSection) -> bool:
    try:
        task.open_samples(tokens, data)
    except DataError:
        return False
    return True
