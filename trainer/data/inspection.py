"""Report the size of the data without tokenizing it, for a dry run.

Counts are exact if the token files are in the cache or the sources are token files; otherwise they are extrapolated
from a sample of each source.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config.schema import DEFAULT_CACHE
from trainer.data.cache import CacheView, NotCachedError
from trainer.data.epochs import build_sample_order
from trainer.data.indexed import IndexedTokens
from trainer.data.prepare import PreparedData, document_frame, load_named_tokenizer, open_prepared
from trainer.data.source_sample import MAX_INSPECTED_ROWS, SourceSample, sample_source
from trainer.data.sources import Source, Split
from trainer.data.tokenizer import load_tokenizer, train_tokenizer
from trainer.errors import DataError
from trainer.tasks import TASKS

if TYPE_CHECKING:
    from trainer.config import LoadedConfig

_TOKENIZED_CHARACTERS = 200_000
"""Limit on the text that is tokenized to estimate the number of tokens per character."""


@dataclass(frozen=True)
class SourceReport:
    """Number of documents and tokens of one source."""

    key: str
    """Configuration key, such as `data.train.0`."""

    name: str
    documents: int | None
    """None if they cannot be counted without reading everything."""

    tokens: int | None
    is_exact: bool
    basis: str
    """How the counts were determined."""

    empty_files: tuple[str, ...] = ()

    def __str__(self) -> str:
        about = "" if self.is_exact else "about "
        counts = [
            "unknown number of documents" if self.documents is None else f"{about}{self.documents:,} documents",
            "unknown number of tokens" if self.tokens is None else f"{about}{self.tokens:,} tokens",
        ]
        return f"{self.key} {self.name}: {', '.join(counts)} ({self.basis})"


@dataclass(frozen=True)
class DataReport:
    """Size of all sources."""

    sources: tuple[SourceReport, ...]
    epoch_samples: int | None
    """Samples of a training epoch; None if the number of tokens is unknown."""

    is_exact: bool


@dataclass(frozen=True)
class _TokenRates:
    """Ratios that convert characters and documents of text to tokens."""

    per_character: float
    per_document: int
    """Special tokens around each document."""


def inspect_data(loaded: LoadedConfig) -> DataReport:
    """Read the first rows of each source, and count or extrapolate documents, tokens and samples.

    Raises:
        DataError: as in training, for these rows.
        ConfigError: no usable tokenizer.
    """
    data = loaded.config.data
    held_out = f"{data.held_out_fraction or 0:g} of the training documents"
    names = {f"data.train.{n}": section.path for n, section in enumerate(data.train)}
    names |= {f"data.validation.{n}": section.path or held_out for n, section in enumerate(data.validation)}
    paths = {key: name for key, name in names.items() if name is not held_out}
    samples = {key: sample_source(_source_of(key, path, loaded)) for key, path in paths.items()}
    prepared = _open_cached(loaded)
    return _estimated_report(loaded, names, samples) if prepared is None else _exact_report(loaded, prepared, names)


def _source_of(key: str, path: str, loaded: LoadedConfig) -> Source:
    data = loaded.config.data
    split: Split = "train" if key.startswith("data.train") else "validation"
    return Source(path, split, data.text_field, data.max_document_bytes)


def _open_cached(loaded: LoadedConfig) -> PreparedData | None:
    """Open the token files without logging; return None if any would have to be built."""
    root = Path(loaded.config.data.cache_dir or DEFAULT_CACHE).expanduser()
    log = logging.getLogger("trainer.data")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return open_prepared(loaded, CacheView(root))
    except (NotCachedError, DataError):  # damaged entries will be rebuilt
        return None
    finally:
        log.setLevel(level)


def _exact_report(loaded: LoadedConfig, prepared: PreparedData, names: dict[str, str]) -> DataReport:
    data, task = loaded.config.data, TASKS[loaded.config.model.task]
    files = iter([*prepared.train, *prepared.validation])
    counts = (*prepared.train_files, *prepared.validation_files)
    reports = []
    for (key, name), count in zip(names.items(), counts, strict=True):
        parts = list(islice(files, count))
        documents, tokens = sum(map(len, parts)), sum(part.tokens for part in parts)
        reports.append(SourceReport(key, name, documents, tokens, is_exact=True, basis="counted"))
    samples = [len(task.open_samples(tokens, data)) for tokens in prepared.train]
    return DataReport(tuple(reports), build_sample_order(loaded, samples, prepared.weights).epoch_samples, True)


def _estimated_report(loaded: LoadedConfig, names: dict[str, str], samples: dict[str, SourceSample]) -> DataReport:
    data, fraction = loaded.config.data, loaded.config.data.held_out_fraction or 0.0
    texts = [text for sample in samples.values() for text in sample.texts]
    frame = document_frame(loaded)
    frame_tokens = 0 if frame is None else len(frame.prefix) + len(frame.suffix)
    rates = _TokenRates(_tokens_per_character(loaded, texts), frame_tokens)
    reports: list[SourceReport] = []
    for key, name in names.items():
        if key in samples:
            kept_fraction = 1 - fraction if key.startswith("data.train") else 1.0
            reports.append(_report_source(key, _source_of(key, name, loaded), samples[key], rates, kept=kept_fraction))
        else:  # the documents held out of the training sources
            train, ratio = reports[: len(data.train)], fraction / (1 - fraction)
            documents = _scaled(_sum([report.documents for report in train]), ratio)
            tokens = _scaled(_sum([report.tokens for report in train]), ratio)
            reports.append(SourceReport(key, name, documents, tokens, is_exact=False, basis="estimated"))
    epoch = [
        None if (count := _estimate_samples(loaded, report)) is None else max(1, round(section.weight * count))
        for section, report in zip(data.train, reports, strict=False)
    ]
    return DataReport(tuple(reports), _sum(epoch), False)


def _report_source(key: str, source: Source, sample: SourceSample, rates: _TokenRates, *, kept: float) -> SourceReport:
    """Report one source, of which the fraction `kept` is not held out."""
    if source.is_indexed:
        files = [IndexedTokens(file) for file in source.files]
        documents, tokens = round(kept * sum(map(len, files))), round(kept * sum(file.tokens for file in files))
        basis = "counted" if kept == 1 else "estimated"
        return SourceReport(key, source.path, documents, tokens, is_exact=kept == 1, basis=basis)
    num_files = max(1, len(source.files))
    basis = f"estimated from up to {MAX_INSPECTED_ROWS} rows of {sample.files:,} of {num_files:,} files"
    empty_files = tuple(sample.empty_files)
    if not sample.has_known_size:
        return SourceReport(key, source.path, None, None, is_exact=False, basis=basis, empty_files=empty_files)
    documents = round(kept * sample.documents)
    tokens = round(kept * sample.characters * rates.per_character) + rates.per_document * documents
    return SourceReport(key, source.path, documents, tokens, is_exact=False, basis=basis, empty_files=empty_files)


def _tokens_per_character(loaded: LoadedConfig, texts: list[str]) -> float:
    """Tokenize some of the texts; where the run would train a tokenizer, train one on them."""
    subsample = _subsample(texts, _TOKENIZED_CHARACTERS)
    if not subsample:
        return 0.0
    tokenizer = load_named_tokenizer(loaded)
    if tokenizer is None:
        with tempfile.TemporaryDirectory() as folder:
            train_tokenizer(iter(subsample), loaded.facts.vocabulary_size, Path(folder))
            tokenizer = load_tokenizer(folder, "data.tokenizer")
    encoded = tokenizer(subsample, add_special_tokens=False, verbose=False)["input_ids"]
    return sum(map(len, encoded)) / sum(map(len, subsample))


def _subsample(texts: list[str], characters: int) -> list[str]:
    """Return every n-th text, with the smallest n that keeps them to about `characters` characters."""
    step = max(1, -(-sum(map(len, texts)) // characters))
    return texts[::step]


def _estimate_samples(loaded: LoadedConfig, report: SourceReport) -> int | None:
    data = loaded.config.data
    if data.packing == "none" or report.tokens is None:
        return report.documents
    return max(1, (report.tokens - 1) // data.sequence_length + (not data.drop_last))


def _scaled(count: int | None, factor: float) -> int | None:
    return None if count is None else round(count * factor)


def _sum(counts: Sequence[int | None]) -> int | None:
    return None if None in counts else sum(count for count in counts if count is not None)
