"""Documents held out of the training data for validation, chosen by the hash of their content.

A document is held out where the 64-bit hash of its content is below `fraction` x 2^64. So the choice depends on
nothing but the content: the order of documents and files, the number of processes and the seed do not matter, and
exact duplicates, also in different sources, are on the same side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xxhash

from trainer.data.documents import TextChunk
from trainer.data.indexed import IndexedTokens
from trainer.data.sources import Source
from trainer.errors import ConfigError, DataError, Problem
from trainer.tasks import TASKS, Task

if TYPE_CHECKING:
    from trainer.config import LoadedConfig
    from trainer.config.schema import DataSection
    from trainer.data.cache import Cache

HASHES = "document_hashes.npy"
"""Beside the token files of a text source: xxh3-64 of the UTF-8 text of each document, in their order."""

Hashes = npt.NDArray[np.uint64]


class DocumentHasher:
    """Hashes documents that arrive in pieces."""

    def __init__(self) -> None:
        self._hasher = xxhash.xxh3_64()
        self._hashes: list[int] = []

    def update(self, text: str) -> None:
        """Append a piece to the open document."""
        self._hasher.update(text.encode())

    def end(self, *, is_written: bool = True) -> int:
        """End the open document.

        Args:
            counts: False for a document that the token files leave out.

        Returns:
            The hash.
        """
        content_hash = self._hasher.intdigest()
        self._hasher.reset()
        if is_written:
            self._hashes.append(content_hash)
        return content_hash

    def save(self, folder: Path) -> None:
        """Write the hashes of all documents that count to `folder`."""
        np.save(folder / HASHES, np.asarray(self._hashes, np.uint64), allow_pickle=False)


def drop_held_out(chunks: Iterable[TextChunk], fraction: float, limit: int) -> Iterator[TextChunk]:
    """The pieces of those documents that are not held out. Of a document, pieces up to `limit` characters are kept in
    memory until its end, and the others are left out."""
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
    """Write the hashes of token documents to `folder`: xxh3-64 of their ids as little-endian 32-bit integers, so that
    the id type of the file does not matter."""
    hashes = np.empty(len(tokens), np.uint64)
    for number in range(len(tokens)):
        hashes[number] = xxhash.xxh3_64_intdigest(tokens.document(number).astype("<i4").tobytes())
    np.save(folder / HASHES, hashes, allow_pickle=False)


def read_hashes(folder: Path, documents: int) -> Hashes:
    """The hashes in `folder`.

    Raises:
        DataError: they are damaged, or not those of so many documents.
    """
    try:
        hashes: Hashes = np.load(folder / HASHES, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{folder / HASHES}: cannot be read: {error}. Delete {folder}") from None
    if hashes.shape != (documents,) or hashes.dtype != np.uint64:
        raise DataError(f"{folder / HASHES}: not the hashes of {documents} documents. Delete {folder}")
    return hashes


def is_held_out(content_hash: int, fraction: float) -> bool:
    """Whether the document with this hash is held out."""
    return content_hash < _limit(fraction)


def held_out_mask(hashes: Hashes, fraction: float) -> npt.NDArray[np.bool_]:
    """Which documents are held out."""
    mask: npt.NDArray[np.bool_] = hashes < np.uint64(_limit(fraction))
    return mask


def _limit(fraction: float) -> int:
    """Hashes below it are held out. `fraction` is between 0 and 1, both excluded."""
    return min(int(Fraction(str(fraction)) * 2**64), 2**64 - 1)


class DocumentSubset(IndexedTokens):
    """Some documents of token files, in their order, as token files of their own. Nothing is copied."""

    def __init__(self, tokens: IndexedTokens, mask: npt.NDArray[np.bool_]) -> None:
        """Args:
        tokens: contiguous. mask: True for the documents of the subset.
        """
        self.__dict__.update(tokens.__dict__)
        self._parent, self._mask = tokens, mask
        self.lengths, self._offsets = tokens.lengths[mask], tokens._offsets[mask]
        itemsize = self._ids.dtype.itemsize
        starts = self._offsets // itemsize
        is_first = np.ones(len(starts), np.bool_)
        is_first[1:] = starts[1:] != (starts + self.lengths)[:-1]
        positions = np.cumsum(self.lengths, dtype=np.int64) - self.lengths
        self._segment_starts = starts[is_first]
        """Position in the file of each run of adjacent documents of the subset."""
        self._segment_positions = positions[is_first]
        """Position of the same in the subset's own stream."""

    def fingerprint(self) -> str:
        """That of all documents, and which of them are in the subset."""
        chosen = xxhash.xxh3_128_hexdigest(np.packbits(self._mask).tobytes())
        return f"{self._parent.fingerprint()}-{chosen}"

    def stream(self, start: int, length: int) -> npt.NDArray[Any]:
        """`length` ids from position `start` of the subset's documents joined together; fewer at the end."""
        end, parts = min(start + length, self.tokens), []
        segment = int(np.searchsorted(self._segment_positions, start, side="right")) - 1
        while start < end:
            position = int(self._segment_positions[segment])
            is_last_segment = segment + 1 == len(self._segment_positions)
            stop = end if is_last_segment else min(end, int(self._segment_positions[segment + 1]))
            first = int(self._segment_starts[segment]) + start - position
            parts.append(self._ids[first : first + stop - start])
            start, segment = stop, segment + 1
        return parts[0] if len(parts) == 1 else np.concatenate([self._ids[:0], *parts])

    @property
    def is_contiguous(self) -> bool:
        """`stream` joins the documents."""
        return True


def split_held_out(
    loaded: LoadedConfig, cache: Cache, sources: Sequence[Source], train: Sequence[Sequence[IndexedTokens]]
) -> tuple[list[list[IndexedTokens]], list[IndexedTokens]]:
    """Divide the training documents by `data.held_out_fraction`.

    Args:
        train: the token files of each of `sources`.

    Returns:
        (token files of each source without the held-out documents, token files of the held-out documents).

    Raises:
        ConfigError: nothing would be left to train on in a source, or nothing to validate on.
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
            raise ConfigError(
                Problem(key, f"{fraction:g} holds out all {sum(map(len, parts)):,} documents of '{source.path}'",
                        "Give files of their own to data.validation (a .txt file is one document)")
            )  # fmt: skip
    usable = [tokens for tokens in held_out if _has_samples(task, tokens, data)]
    if not usable:
        count = f"{sum(len(tokens) for parts in train for tokens in parts):,}"
        problem = "too little for one sample" if held_out else "none"
        raise ConfigError(
            Problem(key, f"{fraction:g} of {count} training documents holds out {problem}",
                    "Raise it, or give files of their own to data.validation (a .txt file is one document)")
        )  # fmt: skip
    return train_parts, usable


def _document_hashes(source: Source, tokens: IndexedTokens, cache: Cache) -> Hashes:
    """Those that tokenising wrote; of token files, which come without, of the ids."""
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
