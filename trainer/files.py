"""Durable files: atomic replacement, syncing, hashes."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import xxhash

_CHUNK_BYTES = 1 << 20


def hash_file(path: Path) -> str:
    """Return the xxh3-128 hash of a file as 32 hexadecimal digits."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def unwritable_reason(folder: Path) -> str | None:
    """Return the reason why no file can be created in a directory, which may not exist yet; None if one can.

    Creates an anonymous file in its nearest existing parent: mode bits do not describe root, network file systems or
    read-only mounts.
    """
    path = Path(os.path.abspath(folder))
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        return f"'{existing}' is a file"
    try:
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return f"'{existing}' cannot be written to: {error.strerror}"


def replace_text(path: Path, text: str) -> None:
    """Replace a small file atomically and durably: a reader sees the old or the new text, even after a power failure.

    Raises:
        OSError: The old file is unchanged, and no temporary file is left.
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
    """Open a file, but not through a symbolic link, so that a write never leaves its folder. An `opener` of `open`."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def remove(path: Path) -> None:
    """Remove a file, a symbolic link (never its target) or a directory tree; do nothing if it is absent.

    Raises:
        OSError: Some of it cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def convert_bare_exceptions_to_os_errors() -> Iterator[None]:
    """Convert exceptions of the class `Exception` itself, which packages in Rust raise on a full disk, to OSError."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from None


def sync_tree(folder: Path) -> None:
    """Flush all files and names of a directory tree to the disk, including its own name in its parent."""
    for parent, _, names in os.walk(folder):
        for name in names:
            sync_file(Path(parent) / name)
        sync_directory(Path(parent))
    sync_directory(folder.parent)


def replace_folder(partial: Path, folder: Path) -> None:
    """Rename the complete directory `partial` to `folder`, which may exist, durably.

    A process that is killed in between leaves `folder` old, absent or new, never mixed.
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
    """Flush the content of a file to the disk."""
    _sync(path, os.O_RDONLY)


def sync_directory(path: Path) -> None:
    """Flush new names and renames in a directory to the disk."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
