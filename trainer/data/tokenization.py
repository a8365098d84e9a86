"""Tokenize the documents of a text source into a pair of token files."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.data.documents import TextChunk
from trainer.data.holdout import DocumentHasher
from trainer.data.indexed import IndexedTokens, IndexedWriter, id_type
from trainer.data.progress import Progress
from trainer.data.sources import Source
from trainer.data.special_tokens import DocumentFrame
from trainer.data.tokenizer import tokenizer_hash
from trainer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_FORMAT = 1
_BATCH_BYTES = 1 << 20
"""Text per call of the tokenizer, which takes about 150 times as much memory."""

_FINGERPRINT_FILE = "fingerprint.txt"
"""File of a cache entry that holds `IndexedTokens.fingerprint()`, which a resumed run compares."""


@dataclass(frozen=True)
class DocumentEncoder:
    """Everything that determines the ids of a document, given its text."""

    tokenizer: PreTrainedTokenizerBase
    frame: DocumentFrame
    vocabulary_size: int
    """Of the model; determines the id type of the token files."""

    def cache_settings(self, text_field: str) -> list[object]:
        """Return the part of a cache key that does not depend on the text."""
        id_name = id_type(self.vocabulary_size).__name__
        return [_FORMAT, tokenizer_hash(self.tokenizer), text_field, self.frame.cache_key, id_name]


def tokenize_source(
    source: Source, encoder: DocumentEncoder, out: Path, *, hasher: DocumentHasher | None = None
) -> None:
    """Write the documents of `source`, each in its frame, as `out/tokens.bin` and `out/tokens.idx`.

    Args:
        source: text to tokenize.
        encoder: tokenizer, special tokens and id type.
        out: existing directory.
        hasher: receives the text of the documents that are written.

    Raises:
        DataError: a file cannot be read as text, or the source has no document.
    """
    progress = Progress(f"tokenizing {source.path} ({source.split})", source.total_bytes)
    num_documents = num_empty = 0
    with IndexedWriter(out / "tokens", id_type(encoder.vocabulary_size)) as writer:
        for chunk, ids in _encode(source, encoder):
            if hasher is not None:
                hasher.update(chunk.text)
                if chunk.is_last:
                    hasher.end(is_written=bool(ids or writer.open_length))
            if ids:
                writer.extend(ids if writer.open_length else [*encoder.frame.prefix, *ids])
            progress.add(chunk.size)
            if chunk.is_last and writer.open_length == 0:
                num_empty += 1
            elif chunk.is_last:
                writer.extend(encoder.frame.suffix)
                writer.end()
                num_documents += 1
    if num_documents == 0:
        raise DataError(f"{source.path}: contains no text ({num_empty} empty documents)")
    (out / _FINGERPRINT_FILE).write_text(open_contiguous(out / "tokens").fingerprint())
    if num_empty:
        log.warning("%s: skipped %d empty documents of %d", source.path, num_empty, num_empty + num_documents)


def _encode(source: Source, encoder: DocumentEncoder) -> Iterator[tuple[TextChunk, list[int]]]:
    """Yield each chunk of the source with its ids, without special tokens."""
    for batch in _batch_chunks(source.chunks()):
        texts = [chunk.text for chunk in batch]
        encoded = encoder.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        yield from zip(batch, encoded, strict=True)


def _batch_chunks(chunks: Iterator[TextChunk]) -> Iterator[list[TextChunk]]:
    """Group chunks into batches of about `_BATCH_BYTES`."""
    batch: list[TextChunk] = []
    size = 0
    for chunk in chunks:
        batch.append(chunk)
        size += chunk.size
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def check_token_entry(folder: Path) -> None:
    """Check the index of a cache entry, and its fingerprint against the recorded one.

    Raises:
        DataError: the files do not belong together.
    """
    fingerprint = open_contiguous(folder / "tokens").fingerprint()
    if fingerprint != (expected := (folder / _FINGERPRINT_FILE).read_text()):
        raise DataError(f"{folder}: fingerprint is {fingerprint}, expected {expected}")


def open_contiguous(prefix: Path) -> IndexedTokens:
    """Open a pair of token files whose documents are stored without gaps.

    Raises:
        DataError: the files are damaged, or there are gaps.
    """
    tokens = IndexedTokens(prefix)
    if not tokens.is_contiguous:
        raise DataError(f"{tokens.idx_path}: documents are not stored contiguously in {tokens.bin_path.name}")
    return tokens
