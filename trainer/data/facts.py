"""What ranks compare about data: how the files look before they are read, and what they became."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from trainer.config.schema import DEFAULT_CACHE
from trainer.data.sources import Source
from trainer.data.tokenizer import tokenizer_hash
from trainer.fault_tolerance import Fact

if TYPE_CHECKING:
    from trainer.config import LoadedConfig
    from trainer.data.indexed import IndexedTokens
    from trainer.data.prepare import PreparedData

_SAME_FILES = "Start all ranks in the same working directory, with the same files"
_SAME_TOKENS = "Give all hosts the same data files and tokenizer"


def source_facts(loaded: LoadedConfig) -> Iterator[Fact]:
    """How the files of each source look, without reading them: the same on all ranks of a host, of which one prepares
    them."""
    data = loaded.config.data
    for split in ("train", "validation"):
        for number, section in enumerate(getattr(data, split)):
            if section.path is None:
                continue
            files = Source(section.path, split, data.text_field).signature()
            yield Fact(f"data.{split}.{number}.path", _describe_files(files), _SAME_FILES, is_per_host=True)


def _describe_files(files: Sequence[Sequence[Any]]) -> str:
    """Names, sizes and times of files, shortened to a few words and a hash."""
    digest = xxhash.xxh3_64(repr(files).encode()).hexdigest()
    size = f", {sum(file[1] for file in files)} bytes" if all(isinstance(file[1], int) for file in files) else ""
    others = f" and {len(files) - 1} other files" if len(files) > 1 else ""
    return f"{files[0][0] if files else 'no file'}{others}{size} ({digest[:8]})"


def prepared_facts(loaded: LoadedConfig, prepared: PreparedData) -> Iterator[Fact]:
    """What the sources became: the same on all ranks, wherever each host keeps it."""
    tokenizer, cache = prepared.tokenizer, Path(loaded.config.data.cache_dir or DEFAULT_CACHE).expanduser()
    yield Fact("tokenizer", None if tokenizer is None else tokenizer_hash(tokenizer)[:12], _SAME_TOKENS)
    yield Fact("special tokens", prepared.frame_json, _SAME_TOKENS)
    for split, files in (("train", prepared.train), ("validation", prepared.validation)):
        for number, tokens in enumerate(files):
            yield Fact(f"data.{split}, token file {number}", _describe_tokens(tokens, cache), _SAME_TOKENS)
    yield Fact("steps", loaded.steps, _SAME_TOKENS)


def _describe_tokens(tokens: IndexedTokens, cache: Path) -> str:
    """Sizes and a hash: of the fingerprint, and for an entry of the cache of its key, in which all content is."""
    entry = tokens.bin_path.parent
    content = f"{entry.name if entry.parent == cache else ''} {tokens.fingerprint()}"
    return f"{len(tokens)} documents, {tokens.tokens} tokens ({xxhash.xxh3_64(content.encode()).hexdigest()})"
