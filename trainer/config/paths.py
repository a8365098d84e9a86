"""Resolving data paths to files, for the rules, which check them, and for data/, which reads them."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.config.file_search import (
    MAX_SEARCHED_ENTRIES,
    SearchTooLargeError,
    fixed_prefix,
    search_folder,
    search_glob,
    special_file_type,
    special_files,
)
from trainer.errors import ConfigError, Problem

BUILTIN = "builtin:python-stdlib"
HUB = "hf://"
TEXT_SUFFIXES = (".jsonl", ".json", ".txt", ".parquet", ".csv", ".arrow", ".bin")
COMPRESSIBLE = (".jsonl", ".json", ".txt")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
_KNOWN = f"{', '.join(TEXT_SUFFIXES)}; of these {', '.join(COMPRESSIBLE)} also compressed ({', '.join(COMPRESSIONS)})"


def is_local(path: str) -> bool:
    """Return whether `path` names files on this machine (not the hub, not a built-in corpus)."""
    return not path.startswith((HUB, "builtin:"))


def compression_of(path: Path) -> str:
    """Return the suffix of the compression of a text file; empty if it is not compressed."""
    is_compressed = path.suffix in COMPRESSIONS and path.with_suffix("").suffix in COMPRESSIBLE
    return path.suffix if is_compressed else ""


def data_suffix(path: Path) -> str | None:
    """Return the suffix of the content of a data file, such as `.jsonl` of `a.jsonl.gz`; None for an unknown one."""
    suffix = path.with_suffix("").suffix if compression_of(path) else path.suffix
    return suffix if suffix in TEXT_SUFFIXES else None


def is_saved_dataset(folder: Path) -> bool:
    """Return whether `folder` was written by `datasets.Dataset.save_to_disk`."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def matching_files(path: str) -> list[Path]:
    """Return the files of a local `path` (a file, a folder or a glob), sorted.

    A folder saved by `datasets` is returned itself. Of another folder, all files with known suffixes are returned:
    .json files only if there are no others, which they often describe, and a compressed file only if its decompressed
    counterpart is absent.
    """
    expanded = Path(os.path.expanduser(path))
    if expanded.is_dir():
        if is_saved_dataset(expanded):
            return [expanded]
        files = {file for file in _searched(expanded) if data_suffix(file)}
        files = {file for file in files if data_suffix(file) != ".json"} or files
        return sorted(file for file in files if not (compression_of(file) and file.with_suffix("") in files))
    if expanded.exists():
        return [expanded]
    return _searched(expanded)


def _searched(path: Path) -> list[Path]:
    """Return the files of a folder or a glob; none where there are too many, which `path_problems` reports."""
    try:
        return search_folder(path) if path.is_dir() else search_glob(path)
    except SearchTooLargeError:
        return []


def _is_search_too_large(path: str) -> bool:
    expanded = Path(os.path.expanduser(path))
    try:
        search_folder(expanded) if expanded.is_dir() else search_glob(expanded)
    except SearchTooLargeError:
        return True
    return False


def _special_files(path: Path) -> list[tuple[Path, str]]:
    """Return what is not a regular file among a data file, the index of a token file, or the files of a folder."""
    if path.is_dir():
        return special_files(path, recursive=True)
    pair = (path, path.with_suffix(".idx")) if path.suffix == ".bin" else (path,)
    return [(file, file_type) for file in pair if (file_type := special_file_type(file)) is not None]


def has_only_token_files(path: str) -> bool:
    """Return whether the local `path` has token files alone, so that no tokenizer is needed."""
    files = matching_files(path) if is_local(path) else []
    return bool(files) and all(file.suffix == ".bin" for file in files)


def has_dataset_splits(folder: Path) -> bool:
    """Return whether `folder` holds a saved dataset with a split for each use."""
    return (folder / "dataset_dict.json").is_file()


def refuse_special_files(folder: Path, key: str) -> None:
    """Refuse a model or tokenizer folder with a named pipe, device or socket, which can block its reader for ever.

    Raises:
        ConfigError: At `key`.
    """
    if files := special_files(folder):
        remedy = "Set it to a folder of regular files"
        raise ConfigError(Problem(key, f"'{path}' is {file_type}", remedy) for path, file_type in files)


def path_problems(key: str, path: str) -> list[Problem]:
    """Return the problems of the data path `path` at `key`; none if it can be opened."""
    if path.startswith("builtin:"):
        if path == BUILTIN:
            return []
        return [Problem(key, f"unknown built-in corpus '{path}'", f"Known: '{BUILTIN}'")]
    if path.startswith(HUB):
        return [] if path != HUB else [Problem(key, f"'{path}' names no dataset", "Write hf://OWNER/NAME")]
    if (file_type := special_file_type(fixed_prefix(path))) is not None:
        remedy = "Set it to a regular file, or a folder or glob of regular files"
        return [Problem(key, f"'{path}' is {file_type}", remedy)]
    files = matching_files(path)
    return list(_file_problems(key, path, files)) if files else [_no_files_problem(key, path)]


def _no_files_problem(key: str, path: str) -> Problem:
    if _is_search_too_large(path):
        reason = f"the search of '{path}' exceeds {MAX_SEARCHED_ENTRIES:,} directory entries"
        return Problem(key, reason, "Name a folder further down")
    reason = "matches no file" if glob.has_magic(path) else "does not exist"
    if Path(os.path.expanduser(path)).is_dir():
        reason = f"is a folder without files of a known format ({_KNOWN}), and not one saved by `datasets`"
    return Problem(key, f"'{path}' {reason}", f"Paths are relative to the working folder, {os.getcwd()}")


def _file_problems(key: str, path: str, files: Sequence[Path]) -> Iterator[Problem]:
    for file in files:
        if not os.access(file, os.R_OK):
            yield Problem(key, f"'{file}' cannot be read: no permission")
    for file in files:
        for special, file_type in _special_files(file):
            yield Problem(key, f"'{special}' is {file_type}", "Use regular files")
    if len({file.suffix == ".bin" for file in files}) == 2:
        yield Problem(key, f"'{path}' holds both text and token files (.bin)", "Name them as two sources")
    for file in files:
        if not file.is_dir() and data_suffix(file) is None:
            yield Problem(key, f"'{file}' has an unknown format", f"Known: {_KNOWN}")
        if file.suffix == ".bin" and not file.with_suffix(".idx").exists():
            yield Problem(key, f"'{file}' has no index '{file.with_suffix('.idx').name}'", "Copy both files")
