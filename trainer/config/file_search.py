"""Bounded searches for files, and detection of files that are not regular: neither must block or run for ever."""

from __future__ import annotations

import fnmatch
import functools
import glob
import os
import stat
from collections.abc import Iterator
from pathlib import Path

MAX_SEARCHED_ENTRIES = 1_000_000
"""Directory entries that a search reads."""

_VIRTUAL = ("/proc", "/sys")

_SPECIAL_FILE_TYPES = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


class SearchTooLargeError(Exception):
    """A search that reads more than `MAX_SEARCHED_ENTRIES` directory entries."""


def special_file_type(path: Path) -> str | None:
    """Return the type of a file that is neither regular nor a directory on a disk, such as "a named pipe".

    Nothing is opened.

    Returns:
        None for a regular file, a directory, or a path that does not exist.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    if status.st_dev in _virtual_devices():
        return "in a virtual file system"
    return next((file_type for is_type, file_type in _SPECIAL_FILE_TYPES if is_type(status.st_mode)), None)


def special_files(folder: Path, *, recursive: bool = False) -> list[tuple[Path, str]]:
    """Return the files of a folder that are not regular, with their types."""
    entries = (folder.rglob("*") if recursive else folder.iterdir()) if folder.is_dir() else ()
    return [(path, file_type) for path in sorted(entries) if (file_type := special_file_type(path)) is not None]


def fixed_prefix(pattern: str) -> Path:
    """Return the deepest directory above all matches of a glob; the path itself if it is not a glob."""
    parts = Path(os.path.expanduser(pattern)).parts
    count = next((n for n, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return Path(*parts[:count])


def search_glob(pattern: Path) -> list[Path]:
    """Return the regular files that a glob matches, sorted.

    `**` matches any number of directories, including symbolic links to directories. Virtual file systems and loops of
    links are skipped.

    Raises:
        SearchTooLargeError: There is too much to read.
    """
    parts = list(pattern.parts)
    parts = [part for before, part in zip(["", *parts], parts, strict=False) if (before, part) != ("**", "**")]
    if parts[-1] == "**":
        parts.append("*")
    start = parts.pop(0) if pattern.is_absolute() else ""
    return sorted({Path(path) for path in _Search().matches(start, parts, ()) if os.path.isfile(path)})


def search_folder(folder: Path) -> list[Path]:
    """Return all regular files below a folder, sorted. Links to directories are not followed.

    Raises:
        SearchTooLargeError: There is too much to read.
    """
    search, files, pending = _Search(), list[Path](), [str(folder)]
    while pending:
        for entry in search.entries(pending.pop()):
            if entry.is_dir(follow_symlinks=False):
                pending.append(entry.path)
            elif os.path.isfile(entry.path):
                files.append(Path(entry.path))
    return sorted(files)


class _Search:
    """A search that counts the directory entries it reads."""

    def __init__(self) -> None:
        self._read = 0

    def entries(self, folder: str) -> list[os.DirEntry[str]]:
        """Return the entries of a folder; none where it cannot be read or is virtual."""
        try:
            if os.stat(folder or ".").st_dev in _virtual_devices():
                return []
            with os.scandir(folder or ".") as scanned:
                entries = list(scanned)
        except OSError:
            return []
        self._read += len(entries)
        if self._read > MAX_SEARCHED_ENTRIES:
            raise SearchTooLargeError
        return entries

    def matches(self, folder: str, parts: list[str], visited: tuple[tuple[int, int], ...]) -> Iterator[str]:
        """Yield paths below `folder` that match `parts`.

        Args:
            folder: Directory that is searched.
            parts: Parts of the pattern that are not matched yet.
            visited: Directories between the first match of `**` and `folder`, to detect loops of links.
        """
        head, *rest = parts
        if head != "**" and not glob.has_magic(head):
            path = os.path.join(folder, head)
            if not rest and os.path.lexists(path):
                yield path
            elif rest and os.path.isdir(path):
                yield from self.matches(path, rest, ())
            return
        if head == "**":
            yield from self.matches(folder, rest, ())
        for entry in self.entries(folder):
            path = os.path.join(folder, entry.name)
            if entry.name.startswith(".") and not head.startswith("."):
                continue
            if head == "**" and (identity := _directory_identity(path)) is not None:
                if identity not in visited:
                    yield from self.matches(path, parts, (*visited, identity))
            elif head != "**" and fnmatch.fnmatchcase(entry.name, head):
                if not rest:
                    yield path
                elif os.path.isdir(path):
                    yield from self.matches(path, rest, ())


def _directory_identity(path: str) -> tuple[int, int] | None:
    """Return the device and inode of a directory; None for anything else."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISDIR(status.st_mode) else None


@functools.cache
def _virtual_devices() -> frozenset[int]:
    devices = {os.stat(folder).st_dev for folder in _VIRTUAL if os.path.isdir(folder)}
    return frozenset(devices - {os.stat("/").st_dev})
