"""Build the token files of all sources in a content-addressed cache, and open them.

One process per host builds; the other ranks of the host wait for it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.checkpoint_format import is_checkpoint
from trainer.config.schema import DEFAULT_CACHE
from trainer.data.cache import Cache
from trainer.data.holdout import HASHES, DocumentHasher, drop_held_out, split_held_out
from trainer.data.indexed import IndexedTokens
from trainer.data.sources import FileSignature, Source
from trainer.data.special_tokens import DocumentFrame, resolve_frame
from trainer.data.tokenization import DocumentEncoder, check_token_entry, open_contiguous, tokenize_source
from trainer.data.tokenizer import END_OF_TEXT, TRAINING_BYTES, check_tokenizer, load_tokenizer, train_tokenizer
from trainer.distributed import Launch
from trainer.errors import ConfigError, DataError
from trainer.json_types import JsonObject
from trainer.run_layout import run_tokenizer_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.config import LoadedConfig
    from trainer.distributed import Store

log = logging.getLogger(__name__)

_TOKENIZER_FORMAT = 1
_SAMPLED_BLOCKS = 64
"""Blocks of token files that are verified at start, over all sources."""


@dataclass(frozen=True)
class PreparedData:
    """Token files of all sources, and the tokenizer that produced them."""

    train: list[IndexedTokens]
    weights: tuple[float, ...]
    """How many times an epoch reads each of `train`."""

    train_files: tuple[int, ...]
    """Number of consecutive files of `train` that belong to each source of `data.train`."""

    validation: list[IndexedTokens]
    validation_files: tuple[int, ...]
    """Number of consecutive files of `validation` that belong to each source of `data.validation`."""

    tokenizer: PreTrainedTokenizerBase | None
    """None if all sources are token files and no tokenizer is named."""

    frame: DocumentFrame | None
    """Special tokens around each document; None if all sources are token files."""

    @property
    def frame_json(self) -> JsonObject | None:
        """The frame for `config.json`."""
        return None if self.frame is None else self.frame.as_json()


def prepare_data(
    loaded: LoadedConfig, launch: Launch | None = None, store: Store | None = None, *, verify_data: bool = False
) -> PreparedData:
    """Build or verify the token files of every source on this host, and open them. All ranks must call it.

    A source consists either of text or of token files, never of both (`path_problems` refuses a mixture). Token files
    given by the user have no block hashes; only their index is checked.

    Args:
        loaded: the configuration.
        launch: local rank 0 builds and verifies. Default: a single process.
        store: key-value store through which the other ranks of the host wait for the builder.
        verify_data: verify every block of the cache instead of a sample.

    Raises:
        ConfigError: no usable tokenizer, a hub dataset that is not available, or a cache that cannot be written to.
        DataError: the content of a file is invalid.
    """
    data = loaded.config.data
    root = Path(data.cache_dir or DEFAULT_CACHE).expanduser()
    blocks = max(4, _SAMPLED_BLOCKS // (len(data.train) + len(data.validation)))
    cache = Cache(root, launch or Launch(), store, None if verify_data else blocks)
    cache.sweep()
    return open_prepared(loaded, cache)


def open_prepared(loaded: LoadedConfig, cache: Cache) -> PreparedData:
    """Open the token files of every source; `cache` builds missing ones. See `prepare_data`."""
    data = loaded.config.data
    train_sources = [Source(s.path, "train", data.text_field, data.max_document_bytes) for s in data.train]
    validation_sources = [
        Source(s.path, "validation", data.text_field, data.max_document_bytes)
        for s in data.validation
        if s.path is not None
    ]
    tokenizer, encoder = _prepare_encoder(loaded, train_sources, validation_sources, cache)
    train = [_open_source(source, encoder, loaded, cache) for source in train_sources]
    held_out: list[IndexedTokens] = []
    if data.held_out_fraction is not None:
        train, held_out = split_held_out(loaded, cache, train_sources, train)
    validation_files = iter([_open_source(source, encoder, loaded, cache) for source in validation_sources])
    validation = [held_out if section.path is None else next(validation_files) for section in data.validation]
    for source, files in zip(train_sources, train, strict=True):
        _log_size(f"train data: {source.path}", files)
    for section, files in zip(data.validation, validation, strict=True):
        name = section.path or f"{section.fraction:g} of the training documents, which are excluded from training"
        _log_size(f"validation data: {name}", files)
    return PreparedData(
        train=[tokens for files in train for tokens in files],
        weights=tuple(section.weight for section, files in zip(data.train, train, strict=True) for _ in files),
        train_files=tuple(map(len, train)),
        validation=[tokens for files in validation for tokens in files],
        validation_files=tuple(map(len, validation)),
        tokenizer=tokenizer,
        frame=None if encoder is None else encoder.frame,
    )


def _log_size(name: str, files: Sequence[IndexedTokens]) -> None:
    num_tokens = sum(tokens.tokens for tokens in files)
    log.info("%s: %s documents, %s tokens", name, f"{sum(map(len, files)):,}", f"{num_tokens:,}")


def load_named_tokenizer(loaded: LoadedConfig) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer that the configuration names; return None if one has to be trained.

    Raises:
        ConfigError: there is none, or it is unusable.
    """
    data, model = loaded.config.data, loaded.config.model
    if data.tokenizer is not None:
        return load_tokenizer(data.tokenizer, "data.tokenizer")
    if model.path is not None:
        path = Path(model.path).expanduser()
        return load_tokenizer(str(run_tokenizer_folder(path)) if is_checkpoint(path) else model.path, "model.path")
    return None


def document_frame(loaded: LoadedConfig) -> DocumentFrame | None:
    """Determine the special tokens around each document, before any data is read and any tokenizer is trained.

    Returns:
        None if all sources are token files.

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


def _prepare_encoder(
    loaded: LoadedConfig, train: Sequence[Source], validation: Sequence[Source], cache: Cache
) -> tuple[PreTrainedTokenizerBase | None, DocumentEncoder | None]:
    """Load or train the tokenizer, and combine it with the special tokens; no encoder if there is no text."""
    data, vocabulary_size = loaded.config.data, loaded.facts.vocabulary_size
    train_texts = [source for source in train if not source.is_indexed]
    has_text = bool(train_texts) or not all(source.is_indexed for source in validation)
    tokenizer: PreTrainedTokenizerBase | None = None
    if has_text or data.tokenizer:
        tokenizer = load_named_tokenizer(loaded) or _trained_tokenizer(loaded, train_texts, cache)
    elif loaded.config.model.path:
        tokenizer = _load_tokenizer_for_export(loaded)
    if tokenizer is None:
        return None, None
    check_tokenizer(tokenizer, vocabulary_size)
    if not has_text:
        return tokenizer, None
    frame = resolve_frame(tokenizer, data.special_tokens)
    log.info('documents: %s (data.special_tokens "%s")', frame, data.special_tokens)
    return tokenizer, DocumentEncoder(tokenizer, frame, vocabulary_size)


def _trained_tokenizer(loaded: LoadedConfig, sources: list[Source], cache: Cache) -> PreTrainedTokenizerBase:
    """Load the tokenizer trained on `sources` from the cache, which trains it if it is missing."""
    data, vocabulary_size = loaded.config.data, loaded.facts.vocabulary_size
    initial_signature = [source.signature() for source in sources]

    def build(folder: Path) -> None:
        names = ", ".join(source.path for source in sources)
        log.info("training a tokenizer of %d entries on %s", vocabulary_size, names)
        train_tokenizer(_training_text(sources, data.held_out_fraction), vocabulary_size, folder)
        for source, signature in zip(sources, initial_signature, strict=True):
            _refuse_changed_source(source, signature)

    settings = ["byte-level BPE", _TOKENIZER_FORMAT, TRAINING_BYTES, data.text_field, vocabulary_size]
    if data.held_out_fraction is not None:
        settings.append(data.held_out_fraction)
    folder = cache.entry(
        [settings, initial_signature],
        lambda: [settings, [source.content_hash() for source in sources]],
        "tokenizer",
        build,
        adopt_unhashed=True,
    )
    return load_tokenizer(str(folder), "data.tokenizer")


def _training_text(sources: Sequence[Source], fraction: float | None) -> Iterator[str]:
    """Yield the first `TRAINING_BYTES` of text that are not held out for validation."""
    remaining = TRAINING_BYTES
    for source in sources:
        chunks = source.chunks()
        for chunk in chunks if fraction is None else drop_held_out(chunks, fraction, TRAINING_BYTES):
            if chunk.text:
                yield chunk.text
            remaining -= chunk.size
            if remaining <= 0:
                return


def _load_tokenizer_for_export(loaded: LoadedConfig) -> PreTrainedTokenizerBase | None:
    """Load the model's tokenizer, which is only saved with the trained model; return None if it has none."""
    try:
        return load_named_tokenizer(loaded)
    except ConfigError as error:
        log.info("the trained model will be written without a tokenizer: %s", error.problems[0].reason)
        return None


def _open_source(
    source: Source, encoder: DocumentEncoder | None, loaded: LoadedConfig, cache: Cache
) -> list[IndexedTokens]:
    """Open the token files of a source; text is tokenized unless the cache has its token files."""
    data = loaded.config.data
    if source.is_indexed:
        return [open_contiguous(file) for file in source.files]
    assert encoder is not None
    settings = encoder.cache_settings(data.text_field)
    needs_hashes = source.split == "train" and data.held_out_fraction is not None
    if needs_hashes:
        settings.append(HASHES)
    initial_signature = source.signature()

    def build(out: Path) -> None:
        hasher = DocumentHasher() if needs_hashes else None
        tokenize_source(source, encoder, out, hasher=hasher)
        _refuse_changed_source(source, initial_signature)
        if hasher is not None:
            hasher.save(out)

    folder = cache.entry(
        [settings, source.split, initial_signature],
        lambda: [settings, source.content_hash()],
        "tokens",
        build,
        check=check_token_entry,
    )
    return [open_contiguous(folder / "tokens")]


def _refuse_changed_source(source: Source, initial_signature: FileSignature) -> None:
    """Check that the files have not changed since `initial_signature`, from which the cache key was computed.

    Otherwise the cache would serve the new content under the hash of the old one to every later run.

    Raises:
        DataError: names, sizes or modification times differ.
    """
    if source.signature() != initial_signature:
        raise DataError(f"{source.path}: changed while it was read. Start again when no process writes to it")
