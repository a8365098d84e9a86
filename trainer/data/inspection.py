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

from trainer.config.paths import HUB, compression_of, data_suffix
from trainer.config.schema import DEFAULT_CACHE
from trainer.data.cache import CacheView, NotCachedError
from trainer.data.compressed import DecompressedFile
from trainer.data.epochs import build_sample_order
from trainer.data.indexed import IndexedTokens
from trainer.data.prepare import PreparedData, document_frame, load_named_tokenizer, open_prepared
from trainer.data.sources import Source
from trainer.data.tokenizer import load_tokenizer, train_tokenizer
from trainer.errors import DataError
from trainer.tasks import TASKS

if TYPE_CHECKING:
    from trainer.config import LoadedConfig

MAX_INSPECTED_FILES = 200
"""Files of a source that are looked at."""

MAX_INSPECTED_ROWS = 100
MAX_INSPECTED_CHARACTERS = 100_000
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
    basis: str
    """What the counts follow from."""

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
    """What is in all sources."""

    sources: tuple[SourceReport, ...]
    epoch_samples: int | None
    """Samples of an epoch of training; None where the tokens are unknown."""

    is_exact: bool


@dataclass
class _SourceSample:
    """The beginning of the files of a source, extrapolated to all of it."""

    texts: list[str] = field(default_factory=list)
    documents: float = 0.0
    characters: float = 0.0
    files: int = 0
    """That were looked at."""

    empty_files: list[str] = field(default_factory=list)
    has_known_size: bool = True
    """False where the size of the whole is unknown."""


def inspect_data(loaded: LoadedConfig) -> DataReport:
    """Look at the first rows of the files, at no more than `MAX_INSPECTED_FILES` of a source, and count.

    Raises:
        DataError: as training would, for what is wrong in these rows. ConfigError: no usable tokenizer.
    """
    data = loaded.config.data
    held_out = f"{data.held_out_fraction or 0:g} of the training documents"
    names = [(f"data.train.{n}", source.path) for n, source in enumerate(data.train)]
    names += [(f"data.validation.{n}", source.path or held_out) for n, source in enumerate(data.validation)]
    samples = {
        f"data.train.{n}": _sample_source(Source(s.path, "train", data.text_field, data.max_document_bytes))
        for n, s in enumerate(data.train)
    }
    samples |= {
        f"data.validation.{n}": _sample_source(
            Source(source.path, "validation", data.text_field, data.max_document_bytes)
        )
        for n, source in enumerate(data.validation)
        if source.path is not None
    }
    prepared = _open_cached(loaded)
    return _estimated_report(loaded, names, samples) if prepared is None else _exact_report(loaded, prepared, names)


def _sample_source(source: Source) -> _SourceSample:
    """The first rows of each file, which raise what training would raise for them."""
    sample = _SourceSample()
    if source.is_indexed:
        for file in source.files[:MAX_INSPECTED_FILES]:
            IndexedTokens(file)
        return sample
    files = source.files
    for path in [source.path] if source.path.startswith(HUB) else map(str, files[:MAX_INSPECTED_FILES]):
        _sample_file(Source(path, source.split, source.text_field, source.max_document_bytes), sample)
        sample.files += 1
    if not sample.texts and len(files) <= MAX_INSPECTED_FILES:
        raise DataError(f"{source.path}: no text in it")
    if len(files) > MAX_INSPECTED_FILES:
        share = sum(map(_content_bytes, files)) / max(1, sum(map(_content_bytes, files[:MAX_INSPECTED_FILES])))
        are_documents = all(map(_is_document_file, files))
        sample.documents = len(files) if are_documents else sample.documents * share
        sample.characters *= share
    return sample


def _sample_file(file: Source, sample: _SourceSample) -> None:
    texts: list[str] = []
    document = ""
    characters = size = 0
    is_complete = True
    for chunk in file.chunks():
        if len(texts) >= MAX_INSPECTED_ROWS or characters >= MAX_INSPECTED_CHARACTERS:
            is_complete = False
            break
        document += chunk.text
        characters, size = characters + len(chunk.text), size + chunk.size
        if chunk.is_last:
            texts += [document] if document else []
            document = ""
    texts += [document] if document else []  # the beginning of a document
    if not texts:
        sample.empty_files.append(file.path)
        return
    scale = 1.0 if is_complete else _extrapolation_factor(file, len(texts), size)
    sample.has_known_size = sample.has_known_size and scale is not None
    sample.texts += texts
    is_single_document = bool(file.files) and all(map(_is_document_file, file.files))
    sample.documents += 1 if is_single_document else len(texts) * (scale or 1)
    sample.characters += characters * (scale or 1)


def _is_document_file(path: Path) -> bool:
    """Whether the file is a text; .txt, and modules of the standard library."""
    return path.is_file() and data_suffix(path) in (".txt", None)


def _extrapolation_factor(file: Source, rows: int, size: int) -> float | None:
    """How many times more there is in the file than was read of it; None where that is unknown."""
    if not file.files:
        return None
    path = file.files[0]
    if path.is_dir() or path.suffix == ".arrow":
        import datasets

        dataset = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.Dataset.from_file(str(path))
        dataset = dataset[file.split] if isinstance(dataset, datasets.DatasetDict) else dataset
        return len(dataset) / rows
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return float(pyarrow.parquet.ParquetFile(path).metadata.num_rows / rows)
    return _content_bytes(path) / max(1, size)


def _content_bytes(path: Path) -> float:
    """Size of a file; of a compressed one about that of its content."""
    if path.is_dir():
        return float(sum(part.stat().st_size for part in path.rglob("*") if part.is_file()))
    size = path.stat().st_size
    if compression := compression_of(path):
        with contextlib.closing(DecompressedFile(path, compression)) as stream:
            content = len(stream.read(_RATIO_BYTES) or b"")
            return size * content / max(1, stream.read_bytes)
    return float(size)


def _open_cached(loaded: LoadedConfig) -> PreparedData | None:
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


def _exact_report(loaded: LoadedConfig, prepared: PreparedData, names: list[tuple[str, str]]) -> DataReport:
    data, task = loaded.config.data, TASKS[loaded.config.model.task]
    files = iter([*prepared.train, *prepared.validation])
    counts = (*prepared.train_files, *prepared.validation_files)
    reports = []
    for (key, name), count in zip(names, counts, strict=True):
        parts = list(islice(files, count))
        documents, tokens = sum(map(len, parts)), sum(part.tokens for part in parts)
        reports.append(SourceReport(key, name, documents, tokens, True, "counted"))
    samples = [len(task.open_samples(tokens, data)) for tokens in prepared.train]
    return DataReport(tuple(reports), build_sample_order(loaded, samples, prepared.weights).epoch_samples, True)


def _estimated_report(
    loaded: LoadedConfig, names: list[tuple[str, str]], samples: dict[str, _SourceSample]
) -> DataReport:
    data, fraction = loaded.config.data, loaded.config.data.held_out_fraction or 0.0
    rate = _tokens_per_character(loaded, [text for sample in samples.values() for text in sample.texts])
    frame = document_frame(loaded)
    frame_tokens = 0 if frame is None else len(frame.prefix) + len(frame.suffix)
    reports: list[SourceReport] = []
    for key, name in names:
        is_train = key.startswith("data.train")
        if key in samples:
            source = Source(name, "train" if is_train else "validation", data.text_field, data.max_document_bytes)
            reports.append(_report(key, source, samples[key], rate, frame_tokens, 1 - fraction if is_train else 1.0))
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


def _report(
    key: str, source: Source, sample: _SourceSample, rate: float, frame_tokens: int, train_fraction: float
) -> SourceReport:
    if source.is_indexed:
        files = [IndexedTokens(file) for file in source.files]
        documents, tokens = (
            round(train_fraction * sum(map(len, files))),
            round(train_fraction * sum(file.tokens for file in files)),
        )
        return SourceReport(
            key, source.path, documents, tokens, train_fraction == 1, "counted" if train_fraction == 1 else "estimated"
        )
    basis = f"estimated from up to {MAX_INSPECTED_ROWS} rows of {sample.files:,} of {max(1, len(source.files)):,} files"
    documents, tokens = round(train_fraction * sample.documents), round(train_fraction * sample.characters * rate)
    if not sample.has_known_size:
        return SourceReport(key, source.path, None, None, False, basis, tuple(sample.empty_files))
    tokens += frame_tokens * documents
    return SourceReport(key, source.path, documents, tokens, False, basis, tuple(sample.empty_files))


def _tokens_per_character(loaded: LoadedConfig, texts: list[str]) -> float:
    """Of these texts, under the tokenizer of the run, or one that is trained on them where the run would train one."""
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
