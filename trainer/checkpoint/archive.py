"""What earlier attempts left: checkpoints that a new attempt leaves aside, and checkpoints that are gone."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.checkpoint.retention import BEST, LATEST, SavedCheckpoint, list_checkpoints, update_pointers
from trainer.events import read_events
from trainer.files import sync_directory

log = logging.getLogger(__name__)

_ATTEMPT = re.compile(r"attempt-(\d+)(-\d+)?")


def archived_attempts(folder: Path) -> list[int]:
    """Numbers of the attempts whose checkpoints have been moved aside."""
    names = os.listdir(folder) if folder.is_dir() else []
    return [int(found[1]) for name in names if (found := _ATTEMPT.fullmatch(name))]


def checkpoints_to_archive(folder: Path, resumed: SavedCheckpoint | None) -> list[Path]:
    """The checkpoints in `folder` that an attempt does not continue, damaged ones included, in the order of their
    steps: all of them, or where it resumes from one of them those that are newer."""
    kept = {one.folder: one for one in list_checkpoints(folder)[0]}
    paths = [path for path in sorted(folder.glob("step-*")) if path.is_dir()]
    if resumed is None or resumed.folder.parent.resolve() != folder.resolve():
        return paths

    def is_newer(path: Path) -> bool:
        return kept[path].order > resumed.order if path in kept else path.name > resumed.folder.name

    return [path for path in paths if is_newer(path)]


def archive_checkpoints(folder: Path, left: Sequence[Path], attempt: int) -> Path:
    """Move checkpoints into `attempt-N` below their folder, N being their latest attempt; pointers follow.

    Retention and later saves never touch what lies there.

    Args:
        left: see `checkpoints_to_archive`; at least one. attempt: number of the attempt that leaves them.
    """
    latest = max(
        (one.manifest.attempt for one in list_checkpoints(folder)[0] if one.folder in left), default=attempt - 1
    )
    base = f"attempt-{latest}"
    candidates = (folder / (base if number == 1 else f"{base}-{number}") for number in range(1, 1_000_000))
    aside = next(path for path in candidates if not any((path / one.name).exists() for one in left))
    for pointer in (LATEST, BEST):
        (folder / pointer).unlink(missing_ok=True)
    aside.mkdir(exist_ok=True)
    for one in left:
        os.rename(one, aside / one.name)
    update_pointers(aside)
    update_pointers(folder)
    sync_directory(aside)
    sync_directory(folder)
    return aside


def last_checkpoint_event(run: Path) -> dict[str, Any] | None:
    """The event by which a run directory must hold a checkpoint: the last save since it last started at step 1, or
    the last resume. None if it has not saved since."""
    found = None
    for event in read_events(run):
        if event["event"] == "start":
            found = None
        elif event["event"] in ("save", "resume"):
            found = event
    return found
