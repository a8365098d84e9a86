"""Names in a run directory, and detection of paths with these names that have another file type."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from trainer.errors import Problem
from trainer.events import EVENTS

LOCK = ".lock"
CHECKPOINTS = "checkpoints"
FINAL = "final"
METRICS = "metrics.jsonl"
TOKENIZER = "tokenizer"

_FILES = (LOCK, "config.json", METRICS, EVENTS)
_FOLDERS = (CHECKPOINTS, FINAL, "logs", TOKENIZER, "wandb")
_FILES_IN_FOLDERS = ("checkpoints/latest", "checkpoints/best", "logs/rank-*.log", "wandb/run-id")
_KEY = "run.output_dir"


def run_tokenizer_folder(checkpoint: Path) -> Path:
    """Return the tokenizer folder of the run that wrote a checkpoint."""
    checkpoints = checkpoint.absolute().parent
    if checkpoints.name.startswith("attempt-"):  # archived by a later attempt
        checkpoints = checkpoints.parent
    return checkpoints.parent / TOKENIZER


def layout_problems(run: Path) -> Iterator[Problem]:
    """Yield a problem for each path below a run directory that the run writes to and that has another file type.

    The run directory itself may be a symbolic link. Nothing below it that the run writes may be one, because the run
    would empty, overwrite or delete its target.
    """
    for names, expected in ((_FILES, "file"), (_FOLDERS, "folder")):
        for name in names:
            yield from _path_problems(run / name, expected)
    for pattern in _FILES_IN_FOLDERS:
        parent, _, name = pattern.partition("/")
        if not (run / parent).is_symlink():
            for path in sorted((run / parent).glob(name)) if "*" in name else [run / parent / name]:
                yield from _path_problems(path, "file")


def _path_problems(path: Path, expected: str) -> Iterator[Problem]:
    try:
        mode = path.lstat().st_mode
    except OSError:  # absent, or below a path that is reported already
        return
    is_expected = stat.S_ISREG(mode) if expected == "file" else stat.S_ISDIR(mode)
    if stat.S_ISLNK(mode):
        reason = f"{path} is a symbolic link, and the run would write to its target"
        yield Problem(_KEY, reason, "Remove it, or make the run directory itself the link")
    elif not is_expected:
        file_type = "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "special file"
        yield Problem(_KEY, f"{path} is a {file_type}, and the run needs a {expected} there", "Move it away")
    elif not os.access(path, os.W_OK):
        yield Problem(_KEY, f"{path} is not writable", "Change its permissions, or choose another folder")
