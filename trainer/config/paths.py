"""How a path in the configuration becomes files. Shared by the rules, which check, and by data/, which reads."""

from __future__ import annotations

import glob
import os
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
    """Whether `path` names files on this machine (not the hub, not a built-in corpus)."""
    return not path.startswith((HUB, "builtin:"))


def compression_of(path: Path) -> str:
    """The suffix that says how a file of text is compressed; empty if it is not."""
    is_compressed = path.suffix in COMPRESSIONS and path.with_suffix("").suffix in COMPRESSIBLE
    return path.suffix if is_compressed else ""


def data_suffix(path: Path) -> str | None:
    """The suffix that says what is in a data file, such as `.jsonl` of `a.jsonl.gz`; None for an unknown one."""
    suffix = path.with_suffix("").suffix if compression_of(path) else path.suffix
    return suffix if suffix in TEXT_SUFFIXES else None


def is_saved_dataset(folder: Path) -> bool:
    """Whether `folder` was written by `datasets.Dataset.save_to_disk`."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def matching_files(path: str) -> list[Path]:
    """The files that a local `path` (a file, a folder or a glob) stands for, in sorted order.

    A folder saved by `datasets` stands for itself; any other folder for all files of a known kind in it: .json files
    only where there is nothing else, because they often describe the others, and a compressed file only where its
    decompressed twin is not there.
    """
    expanded = Path(os.path.expanduser(path))
    if expanded.is_dir():
        if is_saved_dataset(expanded):
            return [expanded]
        found = {f for f in _searched(expanded) if data_suffix(f)}
        found = {f for f in found if data_suffix(f) != ".json"} or found
        return sorted(f for f in found if not (compression_of(f) and f.with_suffix("") in found))
    if expanded.exists():
        return [expanded]
    return _searched(expanded)


def _searched(path: Path) -> list[Path]:
    """The files that a folder or a glob stands for; none where `path_problems` says that there are too many."""
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
    """What is no regular file of what is read for `path`: itself, the index of a token file, the files of a folder."""
    if path.is_dir():
        return special_files(path, recursive=True)
    pair = (path, path.with_suffix(".idx")) if path.suffix == ".bin" else (path,)
    return [(file, file_type) for file in pair if (file_type := special_file_type(file)) is not None]


def has_only_token_files(path: str) -> bool:
    """Whether the local `path` stands for token files alone, so that no tokenizer is needed."""
    files = matching_files(path) if is_local(path) else []
    return bool(files) and all(f.suffix == ".bin" for f in files)


def has_dataset_splits(folder: Path) -> bool:
    """Whether `folder` holds a saved dataset of several splits, of which each use takes its own."""
    return (folder / "dataset_dict.json").is_file()


def refuse_special_files(folder: Path, key: str) -> None:
    """Refuse a model or tokenizer folder with a named pipe, device or socket in it: to read one can wait for ever.

    Raises:
        ConfigError: at `key`.
    """
    if found := special_files(folder):
        raise ConfigError(
            Problem(key, f"'{path}' is {file_type}", "Give a folder of regular files") for path, file_type in found
        )


def path_problems(key: str, path: str) -> list[Problem]:
    """What is wrong with the data path `path`, given at the key `key`; empty when it can be opened."""
    if path.startswith("builtin:"):
        known = [] if path == BUILTIN else [f"unknown built-in corpus '{path}'"]
        return [Problem(key, reason, f"There is one: '{BUILTIN}'") for reason in known]
    if path.startswith(HUB):
        return [] if path != HUB else [Problem(key, f"'{path}' names no dataset", "Write hf://OWNER/NAME")]
    if (file_type := special_file_type(fixed_prefix(path))) is not None:
        return [Problem(key, f"'{path}' is {file_type}", "Give a regular file, or a folder or glob of regular files")]
    files = matching_files(path)
    if not files and _is_search_too_large(path):
        return [
            Problem(key, f"'{path}' searches more than {MAX_SEARCHED_ENTRIES:,} files", "Name a folder deeper down")
        ]
    if not files:
        what = "matches no file" if glob.has_magic(path) else "does not exist"
        if Path(os.path.expanduser(path)).is_dir():
            what = f"is a folder without files of a known kind ({_KNOWN}), and not one saved by `datasets`"
        return [Problem(key, f"'{path}' {what}", f"Paths are relative to the working folder, {os.getcwd()}")]
    problems = [Problem(key, f"'{f}' cannot be read: no permission") for f in files if not os.access(f, os.R_OK)]
    problems += [
        Problem(key, f"'{special}' is {file_type}", "Give regular files")
        for f in files
        for special, file_type in _special_files(f)
    ]
    if len({f.suffix == ".bin" for f in files}) == 2:
        problems.append(Problem(key, f"'{path}' holds both text and token files (.bin)", "Name them as two sources"))
    problems += [
        Problem(key, f"'{f}' is of no kind that can be read", f"Known: {_KNOWN}")
        for f in files
        if not f.is_dir() and data_suffix(f) is None
    ]
    problems += [
        Problem(key, f"'{f}' has no index '{f.with_suffix('.idx').name}' beside it", "Copy both files")
        for f in files
        if f.suffix == ".bin" and not f.with_suffix(".idx").exists()
    ]
    return problems
