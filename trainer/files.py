"""Durable files: atomic replacement, syncing, hashes."""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

_CHUNK_BYTES = 1 << 20


def hash_file(path: Path) -> str:
    """xxh3-128 of a file, as 32 hexadecimal digits."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def replace_text(path: Path, text: str) -> None:
    """Replace a small file atomically and durably: a reader finds the old or the new text, also after a power cut.

    Raises:
        OSError: the old file is unchanged then, and no temporary file is left.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_file(path: Path) -> None:
    """Flush a file's bytes to the disk."""
    _sync(path, os.O_RDONLY)


def sync_directory(path: Path) -> None:
    """Make new names and renames in a directory durable."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
