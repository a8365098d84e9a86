"""The names in a run directory: which are files, which are folders, and which of them stand in the wrong place."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from trainer.errors import Problem
from trainer.events import EVENTS

LOCK = ".lock"

_FILES = (LOCK, "config.json", "metrics.jsonl", EVENTS)
_FOLDERS = ("checkpoints", "final", "logs", "tokenizer", "wandb")
_FILES_BELOW = ("checkpoints/latest", "checkpoints/best", "logs/rank-*.log", "wandb/run-id")
_KEY = "run.output_dir"


def layout_problems(run: Path) -> Iterator[Problem]:
    """What stands where a run in this directory would write, and is something else.

    The run directory itself may be a symbolic link. Nothing below it that the run writes may be one, because the run
    would empty, overwrite or delete what it points to.
    """
    for names, wanted in ((_FILES, "file"), (_FOLDERS, "folder")):
        for name in names:
            yield from _path_problems(run / name, wanted)
    for pattern in _FILES_BELOW:
        parent, _, name = pattern.partition("/")
        if not (run / parent).is_symlink():
            for path in sorted((run / parent).glob(name)) if "*" in name else [run / parent / name]:
                yield from _path_problems(path, "file")


def _path_problems(path: Path, wanted: str) -> Iterator[Problem]:
    try:
        mode = path.lstat().st_mode
    except OSError:  # absent, or below something that is reported already
        return
    is_right = stat.S_ISREG(mode) if wanted == "file" else stat.S_ISDIR(mode)
    if stat.S_ISLNK(mode):
        yield Problem(_KEY, f"{path} is a symbolic link, and the run would write to what it points to",
                      "Remove it, or make the run directory itself the link")  # fmt: skip
    elif not is_right:
        found = "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "special file"
        yield Problem(_KEY, f"{path} is a {found}, and the run needs a {wanted} there", "Move it away")
    elif not os.access(path, os.W_OK):
        yield Problem(_KEY, f"{path} cannot be written to", "Change its permissions, or take another folder")
