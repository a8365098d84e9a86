"""Durable files: atomic replacement, syncing, hashes."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
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
        with open(partial, "w", encoding="utf-8", opener=open_without_following_links) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def open_without_following_links(path: str, flags: int) -> int:
    """An `opener` for `open` that refuses a symbolic link, so that nothing outside its folder is ever written to."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def remove(path: Path) -> None:
    """Remove a file, a symbolic link (never what it points to), or a whole directory; nothing if it is absent.

    Raises:
        OSError: some of it cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def convert_bare_exceptions_to_os_errors() -> Iterator[None]:
    """Turn exceptions of the class `Exception` itself, by which Rust's packages tell of a full disk, into OSError."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from None


def sync_tree(folder: Path) -> None:
    """Flush every file and name below a directory to the disk, and its own name in its parent's."""
    for parent, _, names in os.walk(folder):
        for name in names:
            sync_file(Path(parent) / name)
        sync_directory(Path(parent))
    sync_directory(folder.parent)


def replace_folder(partial: Path, folder: Path) -> None:
    """Rename the complete directory `partial` to `folder`, which may exist, and make that durable.

    A process that is killed in between leaves `folder` old, absent or new, never a mixture.
    """
    old = folder.with_name(f".{folder.name}.deleted")
    remove(old)
    if folder.is_symlink() or folder.exists():
        os.rename(folder, old)
    try:
        os.rename(partial, folder)
    except OSError:
        if old.exists():
            os.rename(old, folder)
        raise
    sync_directory(folder.parent)
    remove(old)


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
