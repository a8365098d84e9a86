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
from trainer.data.frame import DocumentFrame, frame_of
from trainer.data.holdout import HASHES, TextHasher, hold_out, without_held_out
from trainer.data.indexed import IndexedTokens, IndexedWriter, id_type
from trainer.data.progress import Progress
from trainer.data.sources import Source
from trainer.data.text import Piece
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


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += piece.size
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenise(
    source: Source, tokenizer: PreTrainedTokenizerBase, vocabulary: int, frame: DocumentFrame, out: Path,
    hasher: TextHasher | None = None,
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
        for batch in _batches(source.pieces()):
            encoded = tokenizer([piece.text for piece in batch], add_special_tokens=False, verbose=False)["input_ids"]
            for piece, ids in zip(batch, encoded, strict=True):
                if hasher is not None:
                    hasher.update(piece.text)
                if hasher is not None and piece.ends:
                    hasher.end(counts=bool(ids or writer.open_length))
                if ids:
                    writer.extend(ids if writer.open_length else [*frame.prefix, *ids])
                progress.add(piece.size)
                if piece.ends and writer.open_length == 0:
                    empty += 1
                elif piece.ends:
                    writer.extend(frame.suffix)
                    writer.end()
                    documents += 1
    if documents == 0:
        raise DataError(f"{source.path}: no text in it ({empty} empty documents)")
    (out / _FINGERPRINT).write_text(_indexed(out / "tokens").fingerprint())
    if empty:
        log.warning("%s: %d empty documents left out of %d", source.path, empty, empty + documents)


def _training_text(sources: list[Source], fraction: float | None) -> Iterator[str]:
    left = TRAINING_BYTES
    for source in sources:
        pieces = source.pieces()
        for piece in pieces if fraction is None else without_held_out(pieces, fraction, TRAINING_BYTES):
            if piece.text:
                yield piece.text
            left -= piece.size
            if left <= 0:
                return


def named_tokenizer(loaded: LoadedConfig) -> PreTrainedTokenizerBase | None:
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
    tokenizer = named_tokenizer(loaded)
    if tokenizer is None:
        return DocumentFrame() if data.special_tokens == "none" else DocumentFrame((), (0,), (), (END_OF_TEXT,))
    return frame_of(tokenizer, data.special_tokens)


def _refuse_changed(source: Source, before: Sequence[Sequence[Any]]) -> None:
    """Refuse what was built from files that changed in the meantime: the cache would keep it under the hash of another
    content, for every later run.

    Raises:
        DataError: names, sizes or modification times differ from `before`, the appearance that was hashed.
    """
    if source.appearance() != before:
        raise DataError(f"{source.path}: changed while it was read. Start again once nothing writes to it")


def _tokenizer_of(loaded: LoadedConfig, texts: list[Source], cache: Cache) -> PreTrainedTokenizerBase:
    if (named := named_tokenizer(loaded)) is not None:
        return named
    data = loaded.config.data

    before = [s.appearance() for s in texts]

    def build(folder: Path) -> None:
        log.info("training a tokenizer of %d entries on %s", loaded.facts.vocabulary, ", ".join(s.path for s in texts))
        train_tokenizer(_training_text(texts, data.held_out_fraction), loaded.facts.vocabulary, folder)
        for source, appearance in zip(texts, before, strict=True):
            _refuse_changed(source, appearance)

    settings = ["byte-level BPE", _FORMAT, TRAINING_BYTES, data.text_field, loaded.facts.vocabulary]
    if data.held_out_fraction is not None:
        settings.append(data.held_out_fraction)
    folder = cache.entry(
        [settings, before],
        lambda: [settings, [s.content_hash() for s in texts]],
        "tokenizer",
        build,
        adopts=True,
    )
    return load_tokenizer(str(folder), "data.tokenizer")


def _tokenizer_for_export(loaded: LoadedConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the model, which no data needs; None if it has none."""
    try:
        return named_tokenizer(loaded)
    except ConfigError as error:
        log.info("the trained model will be written without a tokenizer: %s", error.problems[0].reason)
        return None


def _check_tokens(folder: Path) -> None:
    """Check the token files of a cache entry: their index, and the fingerprint that a run compares on resuming."""
    found = _indexed(folder / "tokens").fingerprint()
    if found != (expected := (folder / _FINGERPRINT).read_text()):
        raise DataError(f"{folder}: its fingerprint is {found} instead of {expected}")


def _indexed(path: Path) -> IndexedTokens:
    tokens = IndexedTokens(path)
    if not tokens.is_contiguous:
        raise DataError(f"{tokens.idx_path}: its documents do not lie one after the other in {tokens.bin_path.name}")
    return tokens


def _tokens_of(
    source: Source, loaded: LoadedConfig, cache: Cache, tokenizer: PreTrainedTokenizerBase | None,
    frame: DocumentFrame | None,
) -> list[IndexedTokens]:  # fmt: skip
    """The token files of a source; of text, made unless they are in the cache."""
    data = loaded.config.data
    if source.is_indexed:
        return [_indexed(file) for file in source.files]
    assert tokenizer is not None
    assert frame is not None
    settings = [_FORMAT, tokenizer_hash(tokenizer), data.text_field, frame.cache_key,
                id_type(loaded.facts.vocabulary).__name__]  # fmt: skip
    is_divided = source.split == "train" and data.held_out_fraction is not None
    if is_divided:
        settings.append(HASHES)

    before = source.appearance()

    def build(out: Path) -> None:
        hasher = TextHasher() if is_divided else None
        tokenise(source, tokenizer, loaded.facts.vocabulary, frame, out, hasher)
        _refuse_changed(source, before)
        if hasher is not None:
            hasher.save(out)

    folder = cache.entry(
        [settings, source.split, before],
        lambda: [settings, source.content_hash()],
        "tokens",
        build,
        check=_check_tokens,
    )
    return [_indexed(folder / "tokens")]


def prepare_data(
    loaded: LoadedConfig, launch: Launch | None = None, store: Store | None = None, *, verify_data: bool = False
) -> PreparedData:
    """Build and verify the token files of every source on this host, and open them. All ranks must call it.

    A source is either text or token files, never both (`problems_of_path` refuses the mixture). Users' own token files
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
    data, largest = loaded.config.data, loaded.config.data.max_document_bytes
    sources = {
        "train": [Source(s.path, "train", data.text_field, largest) for s in data.train],
        "validation": [
            Source(s.path, "validation", data.text_field, largest) for s in data.validation if s.path is not None
        ],
    }
    texts = [s for s in sources["train"] if not s.is_indexed]
    tokenizer: PreTrainedTokenizerBase | None = None
    frame: DocumentFrame | None = None
    held_out_texts = [s for s in sources["validation"] if not s.is_indexed]
    if texts or held_out_texts or data.tokenizer:
        tokenizer = _tokenizer_of(loaded, texts, cache)
    elif loaded.config.model.path:
        tokenizer = _tokenizer_for_export(loaded)
    if tokenizer is not None:
        check_tokenizer(tokenizer, loaded.facts.vocabulary)
        if texts or held_out_texts:
            frame = frame_of(tokenizer, data.special_tokens)
            log.info('documents: %s (data.special_tokens "%s")', frame, data.special_tokens)

    tokens_of = partial(_tokens_of, loaded=loaded, cache=cache, tokenizer=tokenizer, frame=frame)
    train = [tokens_of(source) for source in sources["train"]]
    held_out: list[IndexedTokens] = []
    if data.held_out_fraction is not None:
        train, held_out = hold_out(data, cache, sources["train"], train)
    of_files = iter([tokens_of(source) for source in sources["validation"]])
    validation = [held_out if section.path is None else next(of_files) for section in data.validation]
    for source, parts in zip(sources["train"], train, strict=True):
        _say_size(f"train data: {source.path}", parts)
    for section, parts in zip(data.validation, validation, strict=True):
        share = section.path or f"{section.fraction:g} of the training documents, which are not trained on"
        _say_size(f"validation data: {share}", parts)
    return PreparedData(
        [part for parts in train for part in parts],
        tuple(section.weight for section, parts in zip(data.train, train, strict=True) for _ in parts),
        tuple(map(len, train)),
        [part for parts in validation for part in parts],
        tuple(map(len, validation)),
        tokenizer,
        frame,
    )


def _say_size(what: str, parts: Sequence[IndexedTokens]) -> None:
    log.info("%s: %s documents, %s tokens", what, f"{sum(map(len, parts)):,}", f"{sum(p.tokens for p in parts):,}")
