"""Block hashes of the files of a cache entry, and their verification.

Format of `complete.json`: `{"format": 2, "block_bytes": N, "files": {NAME: {"size", "mtime_ns", "hashes": [...]}}}`
with one xxh3-128 hash per block. Format 1, written by earlier versions, has no hashes.
"""

from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from trainer.data.progress import Progress
from trainer.files import replace_text, sync_directory, sync_file

RECORD_FILE = "complete.json"
BLOCK_BYTES = 4 << 20

_FORMAT = 2


@dataclass(frozen=True)
class FileRecord:
    """Size, modification time and block hashes of a file when it was written."""

    size: int
    mtime_ns: int
    hashes: tuple[str, ...]
    """One per block of `block_bytes`."""


@dataclass(frozen=True)
class Record:
    """The content of `complete.json`."""

    block_bytes: int
    files: dict[str, FileRecord]
    """By path relative to the entry."""

    def write(self, folder: Path) -> None:
        """Replace `complete.json` of `folder` atomically and durably."""
        total_bytes = {"format": _FORMAT, **asdict(self)}
        replace_text(folder / RECORD_FILE, json.dumps(total_bytes, separators=(",", ":")))


def read_record(folder: Path) -> Record | None:
    """Read the record of an entry; return None if it has no hashes, because an earlier version wrote it.

    Raises:
        ValueError: `complete.json` is damaged.
        OSError: it cannot be read.
    """
    try:
        raw: Any = json.loads((folder / RECORD_FILE).read_bytes())
        if raw["format"] == 1:
            return None
        files = {
            str(name): FileRecord(int(file["size"]), int(file["mtime_ns"]), tuple(map(str, file["hashes"])))
            for name, file in raw["files"].items()
        }
        record = Record(int(raw["block_bytes"]), files)
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{RECORD_FILE} is damaged ({type(error).__name__})") from None
    if raw["format"] != _FORMAT or record.block_bytes < 1 or any(_is_inconsistent(f, record) for f in files.values()):
        raise ValueError(f"{RECORD_FILE} is damaged (inconsistent values)")
    return record


def _is_inconsistent(file: FileRecord, record: Record) -> bool:
    return len(file.hashes) != -(-file.size // record.block_bytes)


def seal(folder: Path) -> None:
    """Sync the files of an entry to the disk, verify every block by reading it back, and write `complete.json`.

    Raises:
        OSError: the disk is full, fails, or does not return what was written.
    """
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != RECORD_FILE)
    files = {}
    for name in names:
        stat = (folder / name).stat()
        files[name] = FileRecord(stat.st_size, stat.st_mtime_ns, tuple(_hashes(folder / name)))
    record = Record(BLOCK_BYTES, files)
    for name in names:
        sync_file(folder / name)
        drop_cached_pages(folder / name)
    for directory in sorted(p for p in folder.rglob("*") if p.is_dir()):
        sync_directory(directory)
    if (damage := _find_damage(folder, record, None)) is not None:
        raise OSError(errno.EIO, f"the disk does not return what was written: {damage}", str(folder))
    record.write(folder)


def find_damage(folder: Path, *, blocks: int | None) -> str | None:
    """Verify an entry that has hashes; return a description of the damage, or None.

    Existence and size of every file are checked. A file whose modification time has changed is verified in full; of
    other files the first block, the last one, and a random sample, which differs between calls.

    Args:
        folder: the entry.
        blocks: number of blocks to verify in each file; None for all.

    Raises:
        ValueError: see `read_record`.
    """
    try:
        record = read_record(folder)
    except OSError as error:
        return f"{RECORD_FILE} cannot be read: {error.strerror}"
    assert record is not None
    return _find_damage(folder, record, blocks)


def _find_damage(folder: Path, record: Record, blocks: int | None) -> str | None:
    total_bytes = sum(file.size for file in record.files.values())
    progress = Progress(f"verifying {folder.name}", total_bytes if blocks is None else None)
    for name, file in record.files.items():
        try:
            stat = (folder / name).stat()
            if stat.st_size != file.size:
                return f"{name}: size is {stat.st_size:,} bytes, expected {file.size:,}"
            selected = _select_blocks(len(file.hashes), blocks if stat.st_mtime_ns == file.mtime_ns else None)
            for block, block_hash in _hash_blocks(folder / name, record.block_bytes, selected):
                if block_hash != file.hashes[block]:
                    return f"{name}: hash mismatch in block {block} (at byte {block * record.block_bytes:,})"
                progress.add(record.block_bytes)
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _select_blocks(count: int, blocks: int | None) -> Iterable[int]:
    if blocks is None or count <= blocks:
        return range(count)
    return sorted({0, count - 1, *random.SystemRandom().sample(range(1, count - 1), max(0, blocks - 2))})


def _hashes(path: Path) -> Iterator[str]:
    count = -(-path.stat().st_size // BLOCK_BYTES)
    return (block_hash for _, block_hash in _hash_blocks(path, BLOCK_BYTES, range(count)))


def _hash_blocks(path: Path, block_bytes: int, blocks: Iterable[int]) -> Iterator[tuple[int, str]]:
    buffer = memoryview(bytearray(block_bytes))
    with path.open("rb", buffering=0) as file:
        for block in blocks:
            file.seek(block * block_bytes)
            filled = 0
            while filled < block_bytes and (count := file.readinto(buffer[filled:])):
                filled += count
            yield block, xxhash.xxh3_128_hexdigest(buffer[:filled])


def drop_cached_pages(path: Path) -> None:
    """Evict a synced file from the page cache, so that the next read comes from the disk."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def update_mtimes(folder: Path) -> None:
    """Record changed modification times, such as those of a copy, of files that have been verified in full.

    Only one process at a time may call it for an entry.

    Raises:
        OSError: `complete.json` is unchanged, so the next verification reads those files in full again.
    """
    record = read_record(folder)
    assert record is not None
    times = {name: (folder / name).stat().st_mtime_ns for name in record.files}
    if any(record.files[name].mtime_ns != time for name, time in times.items()):
        files = {name: replace(file, mtime_ns=times[name]) for name, file in record.files.items()}
        replace(record, files=files).write(folder)
