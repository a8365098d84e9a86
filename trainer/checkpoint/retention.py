"""The retention policy: the best checkpoints, the expired ones, and the pointers to the newest and the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from trainer.checkpoint.saved import BEST, LATEST, SavedCheckpoint, list_checkpoints
from trainer.config.schema import CheckpointSection
from trainer.files import replace_text


def best_checkpoints(checkpoints: Sequence[SavedCheckpoint], count: int = 1) -> list[SavedCheckpoint]:
    """Return the checkpoints of the lowest validation loss, best first; of equal losses the older is better.

    Only losses over the same samples as the newest evaluated checkpoint's are compared.
    """
    evaluated = [c for c in checkpoints if c.loss is not None and math.isfinite(c.loss)]
    if evaluated:
        samples = max(evaluated, key=lambda checkpoint: checkpoint.order).evaluated_samples
        evaluated = [checkpoint for checkpoint in evaluated if checkpoint.is_comparable(samples)]
    return sorted(evaluated, key=lambda checkpoint: (checkpoint.loss, checkpoint.order))[:count]


def expired(checkpoints: Sequence[SavedCheckpoint], section: CheckpointSection) -> list[SavedCheckpoint]:
    """Return the checkpoints to delete under the retention policy, newest first.

    Args:
        checkpoints: All checkpoints, newest first.
        section: Holds the policy: `keep_last`, `keep_best`, `keep_every_steps`.
    """
    if section.keep_last is None:
        return []
    best = best_checkpoints(checkpoints, section.keep_best)
    retained = {checkpoint.folder for checkpoint in (*checkpoints[: section.keep_last], *best)}
    every = section.keep_every_steps
    return [c for c in checkpoints if c.folder not in retained and not (every and c.manifest.step % every == 0)]


def update_pointers(folder: Path) -> None:
    """Write the names of the newest and the best checkpoint into `latest` and `best`."""
    checkpoints, _ = list_checkpoints(folder)
    for pointer, targets in ((LATEST, checkpoints[:1]), (BEST, best_checkpoints(checkpoints))):
        if targets:
            replace_text(folder / pointer, targets[0].folder.name + "\n")
