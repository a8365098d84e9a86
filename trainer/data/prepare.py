"""Tokenises once, into a cache named by content: by one process per host, while the others wait for a file.

Runs before the world is joined, so nothing here can run into the timeout of a collective.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from trainer.config.schema import DEFAULT_CACHE
from trainer.data.frame import DocumentFrame, frame_of
from trainer.data.holdout import HASHES, TextHasher, hold_out, without_held_out
from trainer.data.indexed import IndexedTokens, IndexedWriter, id_type
from trainer.data.sources import Piece, Source
from trainer.data.tokenizer import (
    END_OF_TEXT,
    TRAINING_BYTES,
    check_tokenizer,
    load_tokenizer,
    tokenizer_hash,
    train_tokenizer,
)
from trainer.errors import ConfigError, DataError
from trainer.store import is_checkpoint, tokenizer_beside

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.config import LoadedConfig

log = logging.getLogger(__name__)

_FORMAT = 1
_BATCH_BYTES = 4 << 20
_GRACE_SECONDS = 600.0


@dataclass(frozen=True)
class PreparedData:
    """Everything that training reads, as token files, and the tokenizer that made them."""

    train: list[IndexedTokens]
    weights: tuple[float, ...]
    """How often an epoch reads each of `train`."""

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


@dataclass(frozen=True)
class Cache:
    """A folder of things that are built once and then only read."""

    root: Path
    builder: bool
    """Whether this process builds what is missing on this host; the others wait for it."""

    def entry(self, appearance: Any, content: Callable[[], Any], kind: str, build: Callable[[Path], None]) -> Path:
        """The folder of what `content()` describes, built by `build(folder)` if it is not there yet.

        Args:
            appearance: JSON by which to find, without reading the sources, the content hash found earlier.
            content: JSON that says all that the result depends on.
            kind: begins the folder's name.
        """
        alias = self.root / "aliases" / f"{_digest(appearance)}.json"
        if found := self._follow(alias):
            return found
        if not self.builder:
            return self._wait(alias)
        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(str(self._lock(alias))):
            if found := self._follow(alias):
                return found
            name = f"{kind}-{_digest(content())[:32]}"
            self._build(self.root / name, build)
            alias.parent.mkdir(exist_ok=True)
            _write_atomically(alias, json.dumps({"name": name}))
        return self.root / name

    def _lock(self, alias: Path) -> Path:
        return self.root / f".{alias.stem[:32]}.lock"

    def _follow(self, alias: Path) -> Path | None:
        try:
            folder = self.root / json.loads(alias.read_text())["name"]
        except (OSError, ValueError, KeyError):
            return None
        return folder if (folder / "complete.json").is_file() else None

    def _build(self, folder: Path, build: Callable[[Path], None]) -> None:
        if (folder / "complete.json").is_file():
            return
        partial = self.root / f".{folder.name}.{uuid.uuid4().hex[:8]}.partial"
        partial.mkdir()
        try:
            build(partial)
            (partial / "complete.json").write_text(json.dumps({"format": _FORMAT}))
            if not (folder / "complete.json").is_file():  # another run may have built the same meanwhile
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _wait(self, alias: Path) -> Path:
        """Waits until the builder has finished; gives up when there has been no builder for a long time."""
        orphaned = time.monotonic()
        while not (found := self._follow(alias)):
            time.sleep(0.2)
            if self._is_locked(self._lock(alias)):
                orphaned = time.monotonic()
            elif time.monotonic() - orphaned > _GRACE_SECONDS:
                raise DataError(f"{self.root}: the process that prepares the data on this host is gone")
        return found

    @staticmethod
    def _is_locked(path: Path) -> bool:
        if not path.exists():
            return False
        lock = FileLock(str(path))
        try:
            lock.acquire(blocking=False)
        except TimeoutError:
            return True
        lock.release()
        return False


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_suffix(f".{uuid.uuid4().hex[:8]}")
    partial.write_text(text)
    os.replace(partial, path)


class _Progress:
    """Says how far long work has come: every few seconds a line with rate and time left."""

    def __init__(self, what: str, total: int | None) -> None:
        self._what, self._total = what, total
        self._start = self._last = time.monotonic()
        self._done = 0

    def add(self, size: int) -> None:
        self._done += size
        now = time.monotonic()
        if now - self._last < 5:
            return
        self._last = now
        rate = self._done / (now - self._start)
        if self._total:
            left = max(0, self._total - self._done) / max(rate, 1)
            log.info("%s: %d %% of %.1f MB, %.1f MB/s, %d s left", self._what, 100 * self._done // self._total,
                     self._total / 1e6, rate / 1e6, left)  # fmt: skip
        else:
            log.info("%s: %.1f MB, %.1f MB/s", self._what, self._done / 1e6, rate / 1e6)


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
    progress = _Progress(f"tokenising {source.path} ({source.split})", source.total_bytes)
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


def _named_tokenizer(loaded: LoadedConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer that the configuration names; None where one is trained."""
    data, model = loaded.config.data, loaded.config.model
    if data.tokenizer is not None:
        return load_tokenizer(data.tokenizer, "data.tokenizer")
    if model.path is not None:
        path = Path(model.path).expanduser()
        return load_tokenizer(str(tokenizer_beside(path)) if is_checkpoint(path) else model.path, "model.path")
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
    tokenizer = _named_tokenizer(loaded)
    if tokenizer is None:
        return DocumentFrame() if data.special_tokens == "none" else DocumentFrame((), (0,), (), (END_OF_TEXT,))
    return frame_of(tokenizer, data.special_tokens)


def _tokenizer_of(loaded: LoadedConfig, texts: list[Source], cache: Cache) -> PreTrainedTokenizerBase:
    if (named := _named_tokenizer(loaded)) is not None:
        return named
    data = loaded.config.data

    def build(folder: Path) -> None:
        log.info("training a tokenizer of %d entries on %s", loaded.facts.vocabulary, ", ".join(s.path for s in texts))
        train_tokenizer(_training_text(texts, data.held_out_fraction), loaded.facts.vocabulary, folder)

    settings = ["byte-level BPE", _FORMAT, TRAINING_BYTES, data.text_field, loaded.facts.vocabulary]
    if data.held_out_fraction is not None:
        settings.append(data.held_out_fraction)
    folder = cache.entry(
        [settings, [s.appearance() for s in texts]],
        lambda: [settings, [s.content_hash() for s in texts]],
        "tokenizer",
        build,
    )
    return load_tokenizer(str(folder), "data.tokenizer")


def _tokenizer_for_export(loaded: LoadedConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the model, which no data needs; None if it has none."""
    try:
        return _named_tokenizer(loaded)
    except ConfigError as error:
        log.info("the trained model will be written without a tokenizer: %s", error.problems[0].reason)
        return None


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

    def build(out: Path) -> None:
        hasher = TextHasher() if is_divided else None
        tokenise(source, tokenizer, loaded.facts.vocabulary, frame, out, hasher)
        if hasher is not None:
            hasher.save(out)

    folder = cache.entry(
        [settings, source.split, source.appearance()],
        lambda: [settings, source.content_hash()],
        "tokens",
        build,
    )
    return [_indexed(folder / "tokens")]


def prepare_data(loaded: LoadedConfig, *, builder: bool) -> PreparedData:
    """Makes sure that every source is there as token files on this host, and opens them.

    A source is either text or token files, never both (`problems_of_path` refuses the mixture).

    Raises:
        ConfigError: no usable tokenizer, a hub dataset that cannot be had.
        DataError: something wrong inside a file.
    """
    data = loaded.config.data
    root = Path(data.cache_dir or DEFAULT_CACHE).expanduser()
    cache = Cache(root, builder)
    sources = {
        "train": [Source(s.path, "train", data.text_field) for s in data.train],
        "validation": [Source(s.path, "validation", data.text_field) for s in data.validation if s.path is not None],
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
        [part for parts in validation for part in parts],
        tuple(map(len, validation)),
        tokenizer,
        frame,
    )


def _say_size(what: str, parts: Sequence[IndexedTokens]) -> None:
    log.info("%s: %s documents, %s tokens", what, f"{sum(map(len, parts)):,}", f"{sum(p.tokens for p in parts):,}")
