"""Checkpoints of earlier attempts: archiving those that an attempt does not continue, and detecting lost ones."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.checkpoint.retention import update_pointers
from trainer.checkpoint.saved import BEST, CHECKPOINT_GLOB, LATEST, SavedCheckpoint, list_checkpoints
from trainer.events import read_events
from trainer.files import sync_directory

_ATTEMPT = re.compile(r"attempt-(\d+)(-\d+)?")
_MAX_ARCHIVES = 1_000_000


def archived_attempts(folder: Path) -> list[int]:
    """Return the numbers of the attempts whose checkpoints have been archived."""
    names = os.listdir(folder) if folder.is_dir() else []
    return [int(match[1]) for name in names if (match := _ATTEMPT.fullmatch(name))]


def checkpoints_to_archive(folder: Path, resumed: SavedCheckpoint | None) -> list[Path]:
    """Return the checkpoints in `folder` that an attempt does not continue, damaged ones included, in step order.

    These are all of them, or those newer than `resumed` if that lies in `folder`.
    """
    checkpoints = {checkpoint.folder: checkpoint for checkpoint in list_checkpoints(folder)[0]}
    paths = [path for path in sorted(folder.glob(CHECKPOINT_GLOB)) if path.is_dir()]
    if resumed is None or resumed.folder.parent.resolve() != folder.resolve():
        return paths

    def is_newer(path: Path) -> bool:
        if path in checkpoints:
            return checkpoints[path].order > resumed.order
        return path.name > resumed.folder.name

    return [path for path in paths if is_newer(path)]


def archive_checkpoints(folder: Path, paths: Sequence[Path], attempt: int) -> Path:
    """Move checkpoints into `attempt-N` in their folder, where N is their latest attempt, and update the pointers.

    Retention and later saves never touch an archive.

    Args:
        folder: Folder of the checkpoints.
        paths: See `checkpoints_to_archive`; at least one.
        attempt: Number of the attempt that does not continue them.

    Returns:
        The archive.
    """
    attempts = [c.manifest.attempt for c in list_checkpoints(folder)[0] if c.folder in paths]
    base = f"attempt-{max(attempts, default=attempt - 1)}"
    candidates = (folder / (base if i == 1 else f"{base}-{i}") for i in range(1, _MAX_ARCHIVES))
    archive = next(candidate for candidate in candidates if not any((candidate / path.name).exists() for path in paths))
    for pointer in (LATEST, BEST):
        (folder / pointer).unlink(missing_ok=True)
    archive.mkdir(exist_ok=True)
    for path in paths:
        os.rename(path, archive / path.name)
    update_pointers(archive)
    update_pointers(folder)
    sync_directory(archive)
    sync_directory(folder)
    return archive


def last_checkpoint_event(run: Path) -> dict[str, Any] | None:
    """Return the event that proves that a run directory must hold a checkpoint, or None.

    It is the last save or resume since the run last started at step 1.
    """
    last = None
    for event in read_events(run):
        if event["event"] == "start":
            last = None
        elif event["event"] in ("save", "resume"):
            last = event
    return last
