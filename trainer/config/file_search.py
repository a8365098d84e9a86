"""Bounded searches for files, and what is no regular file: neither may hang or run for ever."""

from __future__ import annotations

import fnmatch
import functools
import glob
import os
import stat
from collections.abc import Iterator
from pathlib import Path

MAX_SEARCHED_ENTRIES = 1_000_000
"""Directory entries that a search looks at."""

_VIRTUAL = ("/proc", "/sys")

_SPECIAL_FILE_TYPES = ((stat.S_ISFIFO, "a named pipe"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
          (stat.S_ISSOCK, "a socket"))  # fmt: skip


class SearchTooLargeError(Exception):
    """More than `MAX_SEARCHED_ENTRIES` directory entries."""


def special_file_type(path: Path) -> str | None:
    """What `path` is, such as "a named pipe", if it is neither a regular file nor a directory on a disk; None if it is,
    or does not exist. Nothing is opened."""
    try:
        found = path.stat()
    except OSError:
        return None
    if found.st_dev in _virtual_devices():
        return "in a virtual file system"
    return next((file_type for is_type, file_type in _SPECIAL_FILE_TYPES if is_type(found.st_mode)), None)


def special_files(folder: Path, *, recursive: bool = False) -> list[tuple[Path, str]]:
    """Files of a folder that are no regular ones, with what they are."""
    entries = (folder.rglob("*") if recursive else folder.iterdir()) if folder.is_dir() else ()
    return [(path, file_type) for path in sorted(entries) if (file_type := special_file_type(path)) is not None]


def fixed_prefix(pattern: str) -> Path:
    """The deepest directory above everything that a glob can match, or the path itself where it is no glob."""
    parts = Path(os.path.expanduser(pattern)).parts
    count = next((n for n, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return Path(*parts[:count])


def search_glob(pattern: Path) -> list[Path]:
    """The regular files that a glob matches, sorted. `**` is any number of directories, symbolic links to directories
    included; virtual file systems and loops of links are left out.

    Raises:
        SearchTooLargeError: too much to look at.
    """
    parts = list(pattern.parts)
    parts = [part for before, part in zip(["", *parts], parts, strict=False) if (before, part) != ("**", "**")]
    if parts[-1] == "**":
        parts.append("*")
    start = parts.pop(0) if pattern.is_absolute() else ""
    return sorted({Path(found) for found in _Search().matches(start, parts, ()) if os.path.isfile(found)})


def search_folder(folder: Path) -> list[Path]:
    """All regular files below a folder, sorted; links to directories are not followed.

    Raises:
        SearchTooLargeError: too much to look at.
    """
    search, found, pending = _Search(), list[Path](), [str(folder)]
    while pending:
        for entry in search.entries(pending.pop()):
            if entry.is_dir(follow_symlinks=False):
                pending.append(entry.path)
            elif os.path.isfile(entry.path):
                found.append(Path(entry.path))
    return sorted(found)


class _Search:
    def __init__(self) -> None:
        self._seen = 0

    def entries(self, folder: str) -> list[os.DirEntry[str]]:
        """Of a folder; none where it cannot be read or is virtual."""
        try:
            if os.stat(folder or ".").st_dev in _virtual_devices():
                return []
            with os.scandir(folder or ".") as entries:
                found = list(entries)
        except OSError:
            return []
        self._seen += len(found)
        if self._seen > MAX_SEARCHED_ENTRIES:
            raise SearchTooLargeError
        return found

    def matches(self, folder: str, parts: list[str], visited: tuple[tuple[int, int], ...]) -> Iterator[str]:
        """Paths below `folder` that match `parts`.

        Args:
            above: directories that `**` has passed to come here.
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
            if head == "**" and (identity := _identity(path)) is not None:
                if identity not in visited:
                    yield from self.matches(path, parts, (*visited, identity))
            elif head != "**" and fnmatch.fnmatchcase(entry.name, head):
                if not rest:
                    yield path
                elif os.path.isdir(path):
                    yield from self.matches(path, rest, ())


def _identity(path: str) -> tuple[int, int] | None:
    """By which a directory is known again; None for anything else."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISDIR(found.st_mode) else None


@functools.cache
def _virtual_devices() -> frozenset[int]:
    devices = {os.stat(folder).st_dev for folder in _VIRTUAL if os.path.isdir(folder)}
    return frozenset(devices - {os.stat("/").st_dev})
