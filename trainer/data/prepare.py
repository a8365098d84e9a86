"""Tokenizes once, into a cache named by content: by one process per host, while the others wait for it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.checkpoint_format import is_checkpoint, run_tokenizer_folder
from trainer.config.schema import DEFAULT_CACHE
from trainer.data.cache import Cache
from trainer.data.documents import TextChunk
from trainer.data.holdout import HASHES, DocumentHasher, drop_held_out, split_held_out
from trainer.data.indexed import IndexedTokens, IndexedWriter, id_type
from trainer.data.progress import Progress
from trainer.data.sources import Source
from trainer.data.special_tokens import DocumentFrame, resolve_frame
from trainer.data.tokenizer import (
    END_OF_TEXT,
    TRAINING_BYTES,
    check_tokenizer,
    load_tokenizer,
    tokenizer_hash,
    train_tokenizer,
)
from trainer.distributed import Launch
from trainer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.config import LoadedConfig
    from trainer.distributed import Store

log = logging.getLogger(__name__)

_FORMAT = 1
_BATCH_BYTES = 1 << 20
"""Text that is tokenized at a time; a tokenizer takes some 150 times as much memory."""

_FINGERPRINT = "fingerprint.txt"
_SAMPLED_BLOCKS = 64
"""Blocks of token files that a start verifies, over all sources."""


@dataclass(frozen=True)
class PreparedData:
    """Everything that training reads, as token files, and the tokenizer that made them."""

    train: list[IndexedTokens]
    weights: tuple[float, ...]
    """How often an epoch reads each of `train`."""

    train_files: tuple[int, ...]
    """How many of `train` each source of `data.train` has."""

    validation: list[IndexedTokens]
    validation_files: tuple[int, ...]
    """How many of `validation` each source of `data.validation` has."""

    tokenizer: PreTrainedTokenizerBase | None
    """None where all sources were token files already and no tokenizer was named."""

    frame: DocumentFrame | None
    """What stands around each document; None where all sources were token files already."""

    @property
    def frame_json(self) -> dict[str, Any] | None:
        """The frame for `config.json`."""
        return None if self.frame is None else self.frame.as_json()


def _batch_chunks(chunks: Iterator[TextChunk]) -> Iterator[list[TextChunk]]:
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


def tokenize_source(
    source: Source, tokenizer: PreTrainedTokenizerBase, vocabulary: int, frame: DocumentFrame, out: Path,
    hasher: DocumentHasher | None = None,
) -> None:  # fmt: skip
    """Writes the documents of `source`, each in its frame, as `out/tokens.bin` and `.idx`.

    Args:
        hasher: hashes the documents that are written.

    Raises:
        DataError: for anything wrong inside the files, or if there is no document in them.
    """
    progress = Progress(f"tokenising {source.path} ({source.split})", source.total_bytes)
    empty = 0
    with IndexedWriter(out / "tokens", id_type(vocabulary)) as writer:
        documents = 0
        for batch in _batch_chunks(source.chunks()):
            encoded = tokenizer([chunk.text for chunk in batch], add_special_tokens=False, verbose=False)["input_ids"]
            for chunk, ids in zip(batch, encoded, strict=True):
                if hasher is not None:
                    hasher.update(chunk.text)
                if hasher is not None and chunk.is_last:
                    hasher.end(is_written=bool(ids or writer.open_length))
                if ids:
                    writer.extend(ids if writer.open_length else [*frame.prefix, *ids])
                progress.add(chunk.size)
                if chunk.is_last and writer.open_length == 0:
                    empty += 1
                elif chunk.is_last:
                    writer.extend(frame.suffix)
                    writer.end()
                    documents += 1
    if documents == 0:
        raise DataError(f"{source.path}: no text in it ({empty} empty documents)")
    (out / _FINGERPRINT).write_text(_open_contiguous(out / "tokens").fingerprint())
    if empty:
        log.warning("%s: %d empty documents left out of %d", source.path, empty, empty + documents)


def _training_text(sources: list[Source], fraction: float | None) -> Iterator[str]:
    remaining = TRAINING_BYTES
    for source in sources:
        chunks = source.chunks()
        for chunk in chunks if fraction is None else drop_held_out(chunks, fraction, TRAINING_BYTES):
            if chunk.text:
                yield chunk.text
            remaining -= chunk.size
            if remaining <= 0:
                return


def load_named_tokenizer(loaded: LoadedConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer that the configuration names; None where one is trained."""
    data, model = loaded.config.data, loaded.config.model
    if data.tokenizer is not None:
        return load_tokenizer(data.tokenizer, "data.tokenizer")
    if model.path is not None:
        path = Path(model.path).expanduser()
        return load_tokenizer(str(run_tokenizer_folder(path)) if is_checkpoint(path) else model.path, "model.path")
    return None


def document_frame(loaded: LoadedConfig) -> DocumentFrame | None:
    """What will stand around each document, before anything is read or trained.

    Returns:
        None where all sources are token files already.

    Raises:
        ConfigError: no usable tokenizer.
    """
    data = loaded.config.data
    if all(Source(path, "train", data.text_field).is_indexed for path in data.paths):
        return None
    tokenizer = load_named_tokenizer(loaded)
    if tokenizer is None:
        return DocumentFrame() if data.special_tokens == "none" else DocumentFrame((), (0,), (), (END_OF_TEXT,))
    return resolve_frame(tokenizer, data.special_tokens)


def _refuse_changed_source(source: Source, initial_signature: Sequence[Sequence[Any]]) -> None:
    """Refuse what was built from files that changed in the meantime: the cache would keep it under the hash of another
    content, for every later run.

    Raises:
        DataError: names, sizes or modification times differ from `initial_signature`, the appearance that was hashed.
    """
    if source.signature() != initial_signature:
        raise DataError(f"{source.path}: changed while it was read. Start again once nothing writes to it")


def _prepare_tokenizer(loaded: LoadedConfig, text_sources: list[Source], cache: Cache) -> PreTrainedTokenizerBase:
    if (configured := load_named_tokenizer(loaded)) is not None:
        return configured
    data = loaded.config.data

    initial_signature = [s.signature() for s in text_sources]

    def build(folder: Path) -> None:
        log.info(
            "training a tokenizer of %d entries on %s",
            loaded.facts.vocabulary_size,
            ", ".join(s.path for s in text_sources),
        )
        train_tokenizer(_training_text(text_sources, data.held_out_fraction), loaded.facts.vocabulary_size, folder)
        for source, signature in zip(text_sources, initial_signature, strict=True):
            _refuse_changed_source(source, signature)

    settings = ["byte-level BPE", _FORMAT, TRAINING_BYTES, data.text_field, loaded.facts.vocabulary_size]
    if data.held_out_fraction is not None:
        settings.append(data.held_out_fraction)
    folder = cache.entry(
        [settings, initial_signature],
        lambda: [settings, [s.content_hash() for s in text_sources]],
        "tokenizer",
        build,
        adopt_unhashed=True,
    )
    return load_tokenizer(str(folder), "data.tokenizer")


def _tokenizer_for_export(loaded: LoadedConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the model, which no data needs; None if it has none."""
    try:
        return load_named_tokenizer(loaded)
    except ConfigError as error:
        log.info("the trained model will be written without a tokenizer: %s", error.problems[0].reason)
        return None


def _check_tokens(folder: Path) -> None:
    """Check the token files of a cache entry: their index, and the fingerprint that a run compares on resuming."""
    fingerprint = _open_contiguous(folder / "tokens").fingerprint()
    if fingerprint != (expected := (folder / _FINGERPRINT).read_text()):
        raise DataError(f"{folder}: its fingerprint is {fingerprint} instead of {expected}")


def _open_contiguous(path: Path) -> IndexedTokens:
    tokens = IndexedTokens(path)
    if not tokens.is_contiguous:
        raise DataError(f"{tokens.idx_path}: its documents do not lie one after the other in {tokens.bin_path.name}")
    return tokens


def _open_source(
    source: Source, loaded: LoadedConfig, cache: Cache, tokenizer: PreTrainedTokenizerBase | None,
    frame: DocumentFrame | None,
) -> list[IndexedTokens]:  # fmt: skip
    """The token files of a source; of text, made unless they are in the cache."""
    data = loaded.config.data
    if source.is_indexed:
        return [_open_contiguous(file) for file in source.files]
    assert tokenizer is not None
    assert frame is not None
    settings = [_FORMAT, tokenizer_hash(tokenizer), data.text_field, frame.cache_key,
                id_type(loaded.facts.vocabulary_size).__name__]  # fmt: skip
    is_split = source.split == "train" and data.held_out_fraction is not None
    if is_split:
        settings.append(HASHES)

    initial_signature = source.signature()

    def build(out: Path) -> None:
        hasher = DocumentHasher() if is_split else None
        tokenize_source(source, tokenizer, loaded.facts.vocabulary_size, frame, out, hasher)
        _refuse_changed_source(source, initial_signature)
        if hasher is not None:
            hasher.save(out)

    folder = cache.entry(
        [settings, source.split, initial_signature],
        lambda: [settings, source.content_hash()],
        "tokens",
        build,
        check=_check_tokens,
    )
    return [_open_contiguous(folder / "tokens")]


def prepare_data(
    loaded: LoadedConfig, launch: Launch | None = None, store: Store | None = None, *, verify_data: bool = False
) -> PreparedData:
    """Build and verify the token files of every source on this host, and open them. All ranks must call it.

    A source is either text or token files, never both (`path_problems` refuses the mixture). Users' own token files
    have no hashes; their index is checked.

    Args:
        launch: local rank 0 builds and verifies. Default: a single process.
        store: through which the other ranks of the host wait for it.
        verify_data: verify every block of the cache instead of a sample.

    Raises:
        ConfigError: no usable tokenizer, a hub dataset that is not available, a cache that cannot be written to.
        DataError: something wrong inside a file.
    """
    data = loaded.config.data
    root = Path(data.cache_dir or DEFAULT_CACHE).expanduser()
    blocks = max(4, _SAMPLED_BLOCKS // (len(data.train) + len(data.validation)))
    cache = Cache(root, launch or Launch(), store, None if verify_data else blocks)
    cache.sweep()
    return open_prepared(loaded, cache)


def open_prepared(loaded: LoadedConfig, cache: Cache) -> PreparedData:
    """Open the token files of every source, which `cache` builds where they are missing. See `prepare_data`."""
    data, max_document_bytes = loaded.config.data, loaded.config.data.max_document_bytes
    sources = {
        "train": [Source(s.path, "train", data.text_field, max_document_bytes) for s in data.train],
        "validation": [
            Source(s.path, "validation", data.text_field, max_document_bytes)
            for s in data.validation
            if s.path is not None
        ],
    }
    text_sources = [s for s in sources["train"] if not s.is_indexed]
    tokenizer: PreTrainedTokenizerBase | None = None
    frame: DocumentFrame | None = None
    validation_texts = [s for s in sources["validation"] if not s.is_indexed]
    if text_sources or validation_texts or data.tokenizer:
        tokenizer = _prepare_tokenizer(loaded, text_sources, cache)
    elif loaded.config.model.path:
        tokenizer = _tokenizer_for_export(loaded)
    if tokenizer is not None:
        check_tokenizer(tokenizer, loaded.facts.vocabulary_size)
        if text_sources or validation_texts:
            frame = resolve_frame(tokenizer, data.special_tokens)
            log.info('documents: %s (data.special_tokens "%s")', frame, data.special_tokens)

    open_source = partial(_open_source, loaded=loaded, cache=cache, tokenizer=tokenizer, frame=frame)
    train = [open_source(source) for source in sources["train"]]
    held_out: list[IndexedTokens] = []
    if data.held_out_fraction is not None:
        train, held_out = split_held_out(loaded, cache, sources["train"], train)
    validation_tokens = iter([open_source(source) for source in sources["validation"]])
    validation = [held_out if section.path is None else next(validation_tokens) for section in data.validation]
    for source, parts in zip(sources["train"], train, strict=True):
        _log_size(f"train data: {source.path}", parts)
    for section, parts in zip(data.validation, validation, strict=True):
        share = section.path or f"{section.fraction:g} of the training documents, which are not trained on"
        _log_size(f"validation data: {share}", parts)
    return PreparedData(
        [part for parts in train for part in parts],
        tuple(section.weight for section, parts in zip(data.train, train, strict=True) for _ in parts),
        tuple(map(len, train)),
        [part for parts in validation for part in parts],
        tuple(map(len, validation)),
        tokenizer,
        frame,
    )


def _log_size(what: str, parts: Sequence[IndexedTokens]) -> None:
    log.info("%s: %s documents, %s tokens", what, f"{sum(map(len, parts)):,}", f"{sum(p.tokens for p in parts):,}")
