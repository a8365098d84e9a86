"""Sample the beginning of the files of a source, and extrapolate its size."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

from trainer.config.paths import HUB, compression_of, data_suffix
from trainer.data.compressed import DecompressedFile
from trainer.data.indexed import IndexedTokens
from trainer.data.sources import Source
from trainer.errors import DataError

MAX_INSPECTED_FILES = 200
"""Limit on the files of a source that are sampled."""

MAX_INSPECTED_ROWS = 100
MAX_INSPECTED_CHARACTERS = 100_000
"""Limits on the sample of each file; the first that is reached applies."""

_RATIO_BYTES = 1 << 20
"""Decompressed bytes of a file from which its compression ratio is estimated."""


@dataclass
class SourceSample:
    """Texts from the beginning of the files of a source, and extrapolated counts for all of it."""

    texts: list[str] = field(default_factory=list)
    documents: float = 0.0
    characters: float = 0.0
    files: int = 0
    """Number of sampled files."""

    empty_files: list[str] = field(default_factory=list)
    has_known_size: bool = True
    """False if the counts cannot be extrapolated, as for hub datasets."""


def sample_source(source: Source) -> SourceSample:
    """Read the first rows of each file; of token files only check the index.

    Raises:
        DataError: as in training, for these rows.
    """
    sample = SourceSample()
    if source.is_indexed:
        for file in source.files[:MAX_INSPECTED_FILES]:
            IndexedTokens(file)
        return sample
    files = source.files
    for path in [source.path] if source.path.startswith(HUB) else map(str, files[:MAX_INSPECTED_FILES]):
        _sample_file(Source(path, source.split, source.text_field, source.max_document_bytes), sample)
        sample.files += 1
    if not sample.texts and len(files) <= MAX_INSPECTED_FILES:
        raise DataError(f"{source.path}: contains no text")
    if len(files) > MAX_INSPECTED_FILES:
        factor = sum(map(_content_bytes, files)) / max(1, sum(map(_content_bytes, files[:MAX_INSPECTED_FILES])))
        sample.documents = len(files) if all(map(_is_document_file, files)) else sample.documents * factor
        sample.characters *= factor
    return sample


def _sample_file(file: Source, sample: SourceSample) -> None:
    """Add the first rows of a file, and the extrapolated counts of all of it, to `sample`."""
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
    texts += [document] if document else []  # the beginning of a document that is longer than the sample
    if not texts:
        sample.empty_files.append(file.path)
        return
    factor = 1.0 if is_complete else _extrapolation_factor(file, len(texts), size)
    sample.has_known_size = sample.has_known_size and factor is not None
    sample.texts += texts
    is_single_document = bool(file.files) and all(map(_is_document_file, file.files))
    sample.documents += 1 if is_single_document else len(texts) * (factor or 1)
    sample.characters += characters * (factor or 1)


def _is_document_file(path: Path) -> bool:
    """Return whether the file is one document: .txt, and modules of the standard library."""
    return path.is_file() and data_suffix(path) in (".txt", None)


def _extrapolation_factor(file: Source, rows: int, size: int) -> float | None:
    """Return the ratio of the whole file to the part that was read; None if it is unknown."""
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
    """Return the size of a file or directory; for a compressed file the estimated size of its content."""
    if path.is_dir():
        return float(sum(part.stat().st_size for part in path.rglob("*") if part.is_file()))
    size = path.stat().st_size
    if compression := compression_of(path):
        with contextlib.closing(DecompressedFile(path, compression)) as stream:
            content = len(stream.read(_RATIO_BYTES) or b"")
            return size * content / max(1, stream.read_bytes)
    return float(size)
