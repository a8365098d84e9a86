"""Helpers for tests of the data pipeline."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.configs import with_values
from trainer.config.load import check_config
from trainer.data import (
    PreparedData,
    integrity,
    prepare_data,
)
from trainer.data.batches import (
    BatchShape,
)
from trainer.data.indexed import IndexedTokens, IndexedWriter
from trainer.data.samples import CheckedSamples
from trainer.tasks import TASKS, Collation
from trainer.tasks.samples import DocumentSamples

COLLATE = partial(TASKS["causal_lm"].collate, collation=Collation(4, 0, pad_to_multiple_of=8, mask_padding=True))
"""Collates samples of up to 5 ids."""

Change = Callable[[bytearray], bytes | None]
"""Modifies the bytes of a file in place, or returns the new ones."""


def write_tokens(
    prefix: Path, documents: list[list[int]], dtype: type[np.uint16] | type[np.int32] = np.uint16
) -> IndexedTokens:
    """Write documents of ids to a pair of token files, and open it."""
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add(document)
    return IndexedTokens(prefix)


def prepared(tiny: dict[str, Any], **values: object) -> PreparedData:
    """Prepare the data of a configuration with some values changed."""
    return prepare_data(check_config(with_values(tiny, **values), world_size=1, device="cpu"))


def batch_shape(**values: int) -> BatchShape:
    """Return a shape of 4 samples of 4 tokens per step, with some values changed."""
    return BatchShape(
        **{"global_batch_size": 4, "micro_batch_size": 2, "data_rank": 0, "data_ranks": 1, "collate": COLLATE, **values}
    )


def checked_samples(tmp_path: Path, documents: list[list[int]], vocabulary: int = 100) -> CheckedSamples:
    """Return samples of up to 4 tokens, one per document."""
    tokens = write_tokens(tmp_path / "t", documents)
    return CheckedSamples(DocumentSamples(tokens, 4), tokens, vocabulary)


def open_train(config: dict[str, Any], *, verify_data: bool = False) -> IndexedTokens:
    """Prepare the data of a configuration, and return its first training file."""
    return prepare_data(check_config(config, world_size=1, device="cpu"), verify_data=verify_data).train[0]


def token_folder(config: dict[str, Any]) -> Path:
    """Return the only cache entry with token files."""
    (folder,) = Path(config["data"]["cache_dir"]).glob("tokens-*")
    return folder


def damage(path: Path, change: Change, *, keep_time: bool = True) -> None:
    """Corrupt a file as a failing disk does, which keeps its modification time."""
    stat, raw = path.stat(), bytearray(path.read_bytes())
    raw = bytearray(change(raw) or raw)
    path.write_bytes(raw)
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def flip(offset: int) -> Change:
    """Flip one bit of the byte at `offset`."""

    def change(raw: bytearray) -> None:
        raw[offset] ^= 1

    return change


def zero(offset: int, length: int) -> Change:
    """Overwrite `length` bytes with zeros."""

    def change(raw: bytearray) -> None:
        raw[offset : offset + length] = bytes(length)

    return change


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a cache entry, except for the record of its hashes."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != integrity.RECORD_FILE}
