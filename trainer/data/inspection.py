"""What a dry run can say about the data: the first rows of the files, and how much there is.

Counts are exact where the token files are in the cache, or the data are token files; otherwise they are extrapolated
from the rows that were looked at.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config.paths import HUB, compression_of, kind_of
from trainer.config.schema import DEFAULT_CACHE
from trainer.data.cache import CacheView, NotCachedError
from trainer.data.compressed import Decompressed
from trainer.data.epochs import sample_order
from trainer.data.indexed import IndexedTokens
from trainer.data.prepare import PreparedData, document_frame, named_tokenizer, open_prepared
from trainer.data.samples import samples_of
from trainer.data.sources import Source
from trainer.data.tokenizer import load_tokenizer, train_tokenizer
from trainer.errors import DataError

if TYPE_CHECKING:
    from trainer.config import LoadedConfig

LARGEST_FILES = 200
"""Files of a source that are looked at."""

FIRST_ROWS = 100
FIRST_CHARACTERS = 100_000
"""Of each file, whichever comes first."""

_TOKENIZED_CHARACTERS = 200_000
_RATIO_BYTES = 1 << 20
"""Of a compressed file, to see how much its content is."""


@dataclass(frozen=True)
class SourceReport:
    """What is in one source."""

    key: str
    """Such as `data.train.0`."""

    name: str
    documents: int | None
    """None where they cannot be counted without reading everything."""

    tokens: int | None
    is_exact: bool
    looked_at: str
    """What the counts follow from."""

    empty_files: tuple[str, ...] = ()

    def __str__(self) -> str:
        about = "" if self.is_exact else "about "
        counts = [
            "unknown number of documents" if self.documents is None else f"{about}{self.documents:,} documents",
            "unknown number of tokens" if self.tokens is None else f"{about}{self.tokens:,} tokens",
        ]
        return f"{self.key} {self.name}: {', '.join(counts)} ({self.looked_at})"


@dataclass(frozen=True)
class DataReport:
    """What is in all sources."""

    sources: tuple[SourceReport, ...]
    epoch_samples: int | None
    """Samples of an epoch of training; None where the tokens are unknown."""

    is_exact: bool


@dataclass
class _Sample:
    """The beginning of the files of a source, extrapolated to all of it."""

    texts: list[str] = field(default_factory=list)
    documents: float = 0.0
    characters: float = 0.0
    files: int = 0
    """That were looked at."""

    empty_files: list[str] = field(default_factory=list)
    is_known: bool = True
    """False where the size of the whole is unknown."""


def inspect_data(loaded: LoadedConfig) -> DataReport:
    """Look at the first rows of the files, at no more than `LARGEST_FILES` of a source, and count.

    Raises:
        DataError: as training would, for what is wrong in these rows. ConfigError: no usable tokenizer.
    """
    data = loaded.config.data
    held_out = f"{data.held_out_fraction or 0:g} of the training documents"
    names = [(f"data.train.{n}", source.path) for n, source in enumerate(data.train)]
    names += [(f"data.validation.{n}", source.path or held_out) for n, source in enumerate(data.validation)]
    samples = {
        f"data.train.{n}": _look(Source(s.path, "train", data.text_field, data.max_document_bytes))
        for n, s in enumerate(data.train)
    }
    samples |= {
        f"data.validation.{n}": _look(Source(source.path, "validation", data.text_field, data.max_document_bytes))
        for n, source in enumerate(data.validation)
        if source.path is not None
    }
    prepared = _cached(loaded)
    return _estimated(loaded, names, samples) if prepared is None else _exact(loaded, prepared, names)


def _look(source: Source) -> _Sample:
    """The first rows of each file, which raise what training would raise for them."""
    sample = _Sample()
    if source.is_indexed:
        for file in source.files[:LARGEST_FILES]:
            IndexedTokens(file)
        return sample
    files = source.files
    for path in [source.path] if source.path.startswith(HUB) else map(str, files[:LARGEST_FILES]):
        _look_at(Source(path, source.split, source.text_field, source.largest), sample)
        sample.files += 1
    if not sample.texts and len(files) <= LARGEST_FILES:
        raise DataError(f"{source.path}: no text in it")
    if len(files) > LARGEST_FILES:
        share = sum(map(_bytes_of, files)) / max(1, sum(map(_bytes_of, files[:LARGEST_FILES])))
        are_documents = all(map(_is_one_document, files))
        sample.documents = len(files) if are_documents else sample.documents * share
        sample.characters *= share
    return sample


def _look_at(file: Source, sample: _Sample) -> None:
    texts: list[str] = []
    opened = ""
    characters = size = 0
    is_whole = True
    for piece in file.pieces():
        if len(texts) >= FIRST_ROWS or characters >= FIRST_CHARACTERS:
            is_whole = False
            break
        opened += piece.text
        characters, size = characters + len(piece.text), size + piece.size
        if piece.ends:
            texts += [opened] if opened else []
            opened = ""
    texts += [opened] if opened else []  # the beginning of a document
    if not texts:
        sample.empty_files.append(file.path)
        return
    scale = 1.0 if is_whole else _scale(file, len(texts), size)
    sample.is_known = sample.is_known and scale is not None
    sample.texts += texts
    is_one = bool(file.files) and all(map(_is_one_document, file.files))
    sample.documents += 1 if is_one else len(texts) * (scale or 1)
    sample.characters += characters * (scale or 1)


def _is_one_document(path: Path) -> bool:
    """Whether the file is a text; .txt, and modules of the standard library."""
    return path.is_file() and kind_of(path) in (".txt", None)


def _scale(file: Source, rows: int, size: int) -> float | None:
    """How many times more there is in the file than was read of it; None where that is unknown."""
    if not file.files:
        return None
    path = file.files[0]
    if path.is_dir() or path.suffix == ".arrow":
        import datasets

        found = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.Dataset.from_file(str(path))
        found = found[file.split] if isinstance(found, datasets.DatasetDict) else found
        return len(found) / rows
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return float(pyarrow.parquet.ParquetFile(path).metadata.num_rows / rows)
    return _bytes_of(path) / max(1, size)


def _bytes_of(path: Path) -> float:
    """Size of a file; of a compressed one about that of its content."""
    if path.is_dir():
        return float(sum(part.stat().st_size for part in path.rglob("*") if part.is_file()))
    size = path.stat().st_size
    if compression := compression_of(path):
        with contextlib.closing(Decompressed(path, compression)) as stream:
            content = len(stream.read(_RATIO_BYTES) or b"")
            return size * content / max(1, stream.read_bytes)
    return float(size)


def _cached(loaded: LoadedConfig) -> PreparedData | None:
    """The token files, if all are there and need not be made; quiet about them."""
    root = Path(loaded.config.data.cache_dir or DEFAULT_CACHE).expanduser()
    log = logging.getLogger("trainer.data")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return open_prepared(loaded, CacheView(root))
    except (NotCachedError, DataError):  # what is damaged will be built again
        return None
    finally:
        log.setLevel(level)


def _exact(loaded: LoadedConfig, prepared: PreparedData, names: list[tuple[str, str]]) -> DataReport:
    data = loaded.config.data
    files = iter([*prepared.train, *prepared.validation])
    counts = (*prepared.train_files, *prepared.validation_files)
    reports = []
    for (key, name), count in zip(names, counts, strict=True):
        parts = list(islice(files, count))
        documents, tokens = sum(map(len, parts)), sum(part.tokens for part in parts)
        reports.append(SourceReport(key, name, documents, tokens, True, "counted"))
    samples = [
        len(samples_of(tokens, data.packing, data.sequence_length, drop_last=data.drop_last))
        for tokens in prepared.train
    ]
    return DataReport(tuple(reports), sample_order(loaded, samples, prepared.weights).epoch_samples, True)


def _estimated(loaded: LoadedConfig, names: list[tuple[str, str]], samples: dict[str, _Sample]) -> DataReport:
    data, fraction = loaded.config.data, loaded.config.data.held_out_fraction or 0.0
    rate = _tokens_per_character(loaded, [text for sample in samples.values() for text in sample.texts])
    frame = document_frame(loaded)
    around = 0 if frame is None else len(frame.prefix) + len(frame.suffix)
    reports: list[SourceReport] = []
    for key, name in names:
        is_train = key.startswith("data.train")
        if key in samples:
            source = Source(name, "train" if is_train else "validation", data.text_field, data.max_document_bytes)
            reports.append(_report(key, source, samples[key], rate, around, 1 - fraction if is_train else 1.0))
        else:  # what is held out of the training documents
            train, share = reports[: len(data.train)], fraction / (1 - fraction)
            documents = _scaled(_sum([report.documents for report in train]), share)
            tokens = _scaled(_sum([report.tokens for report in train]), share)
            reports.append(SourceReport(key, name, documents, tokens, False, "estimated"))
    epoch = [
        None if (count := _samples_in(loaded, report)) is None else max(1, round(section.weight * count))
        for section, report in zip(data.train, reports, strict=False)
    ]
    return DataReport(tuple(reports), _sum(epoch), False)


def _report(key: str, source: Source, sample: _Sample, rate: float, around: int, kept: float) -> SourceReport:
    if source.is_indexed:
        files = [IndexedTokens(file) for file in source.files]
        documents, tokens = round(kept * sum(map(len, files))), round(kept * sum(file.tokens for file in files))
        return SourceReport(key, source.path, documents, tokens, kept == 1, "counted" if kept == 1 else "estimated")
    looked_at = f"estimated from up to {FIRST_ROWS} rows of {sample.files:,} of {max(1, len(source.files)):,} files"
    documents, tokens = round(kept * sample.documents), round(kept * sample.characters * rate)
    if not sample.is_known:
        return SourceReport(key, source.path, None, None, False, looked_at, tuple(sample.empty_files))
    tokens += around * documents
    return SourceReport(key, source.path, documents, tokens, False, looked_at, tuple(sample.empty_files))


def _tokens_per_character(loaded: LoadedConfig, texts: list[str]) -> float:
    """Of these texts, under the tokenizer of the run, or one that is trained on them where the run would train one."""
    shown = _beginning(texts, _TOKENIZED_CHARACTERS)
    if not shown:
        return 0.0
    tokenizer = named_tokenizer(loaded)
    if tokenizer is None:
        with tempfile.TemporaryDirectory() as folder:
            train_tokenizer(iter(shown), loaded.facts.vocabulary, Path(folder))
            tokenizer = load_tokenizer(folder, "data.tokenizer")
    encoded = tokenizer(shown, add_special_tokens=False, verbose=False)["input_ids"]
    return sum(map(len, encoded)) / sum(map(len, shown))


def _beginning(texts: list[str], characters: int) -> list[str]:
    """Every n-th text, so that they are no more than so many characters."""
    step = max(1, -(-sum(map(len, texts)) // characters))
    return texts[::step]


def _samples_in(loaded: LoadedConfig, report: SourceReport) -> int | None:
    data = loaded.config.data
    if data.packing == "none" or report.tokens is None:
        return report.documents
    return max(1, (report.tokens - 1) // data.sequence_length + (not data.drop_last))


def _scaled(count: int | None, share: float) -> int | None:
    return None if count is None else round(count * share)


def _sum(counts: Sequence[int | None]) -> int | None:
    return None if None in counts else sum(count for count in counts if count is not None)
