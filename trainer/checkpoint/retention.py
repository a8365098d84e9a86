"""The checkpoints of a run: which there are, which is the newest and the best, and which may go."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint.writer import DELETED
from trainer.checkpoint_format import MANIFEST, Manifest, read_manifest
from trainer.config.schema import CheckpointSection
from trainer.errors import CheckpointError
from trainer.files import replace_text

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""In the run directory."""

LATEST, BEST = "latest", "best"
EVALUATED_SAMPLES = "evaluated_samples"
"""Key of a manifest's `about`: see `Kept.evaluated`."""

_NAME = re.compile(r"step-(\d{8,})")


def checkpoint_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08}"


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that is there, as far as its manifest says."""

    folder: Path
    manifest: Manifest

    @property
    def order(self) -> tuple[int, int]:
        """Later ones are larger: after a rollback a new attempt counts its steps once more."""
        return self.manifest.attempt, self.manifest.step

    @property
    def loss(self) -> float | None:
        """On the held-out data."""
        return self.manifest.losses.get("validation")

    @property
    def evaluated_samples(self) -> list[int] | None:
        """Validation samples of each source that `loss` is the mean over; None if an earlier version wrote it."""
        samples: list[int] | None = self.manifest.about.get(EVALUATED_SAMPLES)
        return samples

    def is_comparable(self, evaluated_samples: Sequence[int] | None) -> bool:
        """Whether `loss` is over the samples that `evaluated_samples` counts.

        Earlier versions chose others where there are several sources and `evaluation.max_batches`.
        """
        if self.evaluated_samples is not None and evaluated_samples is not None:
            return self.evaluated_samples == list(evaluated_samples)
        config = self.manifest.config
        has_limit = config.get("evaluation", {}).get("max_batches") is not None
        return self.evaluated_samples is evaluated_samples or not (has_limit and len(config["data"]["validation"]) > 1)


def list_checkpoints(folder: Path) -> tuple[list[SavedCheckpoint], list[CheckpointError]]:
    """The checkpoints in a folder, newest first, and what is wrong with those whose manifest is damaged."""
    kept, damaged = [], []
    names = sorted(os.listdir(folder), reverse=True) if folder.is_dir() else []
    for name in names:
        if _NAME.fullmatch(name) and (folder / name).is_dir():
            try:
                kept.append(SavedCheckpoint(folder / name, read_manifest(folder / name)))
            except CheckpointError as error:
                damaged.append(error)
    return sorted(kept, key=lambda one: one.order, reverse=True), damaged


def search_folder(path: Path) -> Path | None:
    """The folder of whose checkpoints the newest is meant by `--resume PATH`; None if `path` is a checkpoint itself.

    Raises:
        CheckpointError: it does not exist.
    """
    if not path.is_dir():
        raise CheckpointError(f"checkpoint.resume: {path} is not there")
    if (path / MANIFEST).exists():
        return None
    if (path / CHECKPOINTS).is_dir():
        return path / CHECKPOINTS
    return path if list_checkpoints(path)[0] else None


def best_checkpoints(kept: Sequence[SavedCheckpoint], count: int = 1) -> list[SavedCheckpoint]:
    """Those of the lowest held-out loss, of all that were evaluated at their step; of equal ones the older.

    Only losses over the same samples as the newest one are compared.
    """
    measured = [one for one in kept if one.loss is not None and math.isfinite(one.loss)]
    if measured:
        evaluated_samples = max(measured, key=lambda one: one.order).evaluated_samples
        measured = [one for one in measured if one.is_comparable(evaluated_samples)]
    return sorted(measured, key=lambda one: (one.loss, one.order))[:count]


def update_pointers(folder: Path) -> None:
    """Writes the names of the newest and the best checkpoint into `latest` and `best`."""
    kept, _ = list_checkpoints(folder)
    best = best_checkpoints(kept)
    for name, found in ((LATEST, kept[:1]), (BEST, best)):
        if found:
            replace_text(folder / name, found[0].folder.name + "\n")


def expired(kept: Sequence[SavedCheckpoint], section: CheckpointSection) -> list[SavedCheckpoint]:
    """Those that the retention rules let go. Newest first.

    Args:
        kept: all, newest first.
    """
    if section.keep_last is None:
        return []
    staying = {one.folder for one in (*kept[: section.keep_last], *best_checkpoints(kept, section.keep_best))}
    every = section.keep_every_steps
    return [one for one in kept if one.folder not in staying and not (every and one.manifest.step % every == 0)]


def delete_checkpoint(folder: Path) -> None:
    """Deletes a checkpoint: first its name, so that no half of it is ever taken for one."""
    doomed = folder.with_name(DELETED.format(folder.name))
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def partial_folders(folder: Path) -> Iterator[Path]:
    """What killed runs have left: folders half written or half deleted."""
    for name in sorted(os.listdir(folder)) if folder.is_dir() else []:
        if name.startswith(".step-") and name.endswith((".partial", ".deleted")):
            yield folder / name


def read_pointer(folder: Path, pointer: str) -> Path | None:
    """Where `latest` or `best` points; None if it is not there. Nothing outside of `folder` is ever named.

    Raises:
        CheckpointError: if what it says is no checkpoint's name.
    """
    path = folder / pointer
    try:
        name = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"{path}: {name[:80]!r} is not the name of a checkpoint")
    return folder / name
