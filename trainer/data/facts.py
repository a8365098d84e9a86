"""Facts about the data that ranks compare: file signatures before reading, and token files after preparation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from trainer.config.schema import DEFAULT_CACHE
from trainer.data.sources import FileSignature, Source
from trainer.data.tokenizer import tokenizer_hash
from trainer.fault_tolerance import Fact

if TYPE_CHECKING:
    from trainer.config import LoadedConfig
    from trainer.data.indexed import IndexedTokens
    from trainer.data.prepare import PreparedData

_SAME_FILES = "Start all ranks in the same working directory, with the same files"
_SAME_TOKENS = "Give all hosts the same data files and tokenizer"


def source_facts(loaded: LoadedConfig) -> Iterator[Fact]:
    """Yield names, sizes and times of the files of each source, without reading them.

    They must be equal on all ranks of a host, because one of these ranks prepares the data for all.
    """
    data = loaded.config.data
    for split in ("train", "validation"):
        for number, section in enumerate(getattr(data, split)):
            if section.path is None:
                continue
            files = Source(section.path, split, data.text_field).signature()
            yield Fact(f"data.{split}.{number}.path", _describe_files(files), _SAME_FILES, is_per_host=True)


def _describe_files(files: FileSignature) -> str:
    """Summarize names, sizes and times of files in a few words and a hash."""
    digest = xxhash.xxh3_64(repr(files).encode()).hexdigest()
    sizes = [file[1] for file in files]
    size = f", {sum(map(int, sizes))} bytes" if all(isinstance(size, int) for size in sizes) else ""
    others = f" and {len(files) - 1} other files" if len(files) > 1 else ""
    return f"{files[0][0] if files else 'no file'}{others}{size} ({digest[:8]})"


def prepared_facts(loaded: LoadedConfig, prepared: PreparedData) -> Iterator[Fact]:
    """Yield the content of the token files and the tokenizer, which must be equal on all ranks of all hosts."""
    tokenizer, cache = prepared.tokenizer, Path(loaded.config.data.cache_dir or DEFAULT_CACHE).expanduser()
    yield Fact("tokenizer", None if tokenizer is None else tokenizer_hash(tokenizer)[:12], _SAME_TOKENS)
    yield Fact("special tokens", prepared.frame_json, _SAME_TOKENS)
    for split, files in (("train", prepared.train), ("validation", prepared.validation)):
        for number, tokens in enumerate(files):
            yield Fact(f"data.{split}, token file {number}", _describe_tokens(tokens, cache), _SAME_TOKENS)
    yield Fact("steps", loaded.steps, _SAME_TOKENS)


def _describe_tokens(tokens: IndexedTokens, cache: Path) -> str:
    """Summarize token files: sizes, and a hash of the fingerprint and of the name of the cache entry."""
    entry = tokens.bin_path.parent
    content = f"{entry.name if entry.parent == cache else ''} {tokens.fingerprint()}"
    return f"{len(tokens)} documents, {tokens.tokens} tokens ({xxhash.xxh3_64(content.encode()).hexdigest()})"
