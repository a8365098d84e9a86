"""Checkpoints in a folder: their names, their order, and the pointers `latest` and `best`."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from trainer.checkpoint_format import MANIFEST, Manifest, read_manifest
from trainer.errors import CheckpointError
from trainer.run_layout import CHECKPOINTS

log = logging.getLogger(__name__)

C = TypeVar("C")
T = TypeVar("T")

LATEST, BEST = "latest", "best"
EVALUATED_SAMPLES = "evaluated_samples"
"""Key of a manifest's `about`: see `SavedCheckpoint.evaluated_samples`."""

CHECKPOINT_GLOB = "step-*"
"""Matches the folders of checkpoints."""

PARTIAL = ".{}.partial"
"""Name of the folder of an incomplete checkpoint, from the checkpoint's name."""

DELETED = ".{}.deleted"
"""Name of the folder of a checkpoint that is being deleted."""

_NAME = re.compile(r"step-(\d{1,18})")


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint of a step."""
    return f"step-{step:08}"


def parse_step(name: str) -> int | None:
    """Return the N of `step-N`, with or without leading zeros; None if `name` has another form."""
    match = _NAME.fullmatch(name)
    return None if match is None else int(match[1])


def is_checkpoint_name(name: str) -> bool:
    """Return True if `name` is what `checkpoint_name` returns for a step."""
    step = parse_step(name)
    return step is not None and name == checkpoint_name(step)


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint on disk whose manifest is valid; its files are not verified."""

    folder: Path
    manifest: Manifest

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: newer checkpoints are larger. After a rollback a later attempt repeats steps."""
        return self.manifest.attempt, self.manifest.step

    @property
    def loss(self) -> float | None:
        """Validation loss."""
        return self.manifest.losses.get("validation")

    @property
    def evaluated_samples(self) -> list[int] | None:
        """Validation samples of each source that `loss` is the mean over; None if written by an earlier version."""
        samples: list[int] | None = self.manifest.about.get(EVALUATED_SAMPLES)
        return samples

    def is_comparable(self, evaluated_samples: Sequence[int] | None) -> bool:
        """Return True if `loss` is the mean over the samples that `evaluated_samples` counts.

        Earlier versions chose other samples where there are several sources and `evaluation.max_batches`.
        """
        if self.evaluated_samples is not None and evaluated_samples is not None:
            return self.evaluated_samples == list(evaluated_samples)
        config = self.manifest.config
        has_limit = config.get("evaluation", {}).get("max_batches") is not None
        return self.evaluated_samples is evaluated_samples or not (has_limit and len(config["data"]["validation"]) > 1)


def list_checkpoints(folder: Path) -> tuple[list[SavedCheckpoint], list[CheckpointError]]:
    """Return the checkpoints in a folder, newest first, and the errors of those whose manifest is damaged."""
    checkpoints, errors = [], []
    names = sorted(os.listdir(folder), reverse=True) if folder.is_dir() else []
    for name in names:
        if is_checkpoint_name(name) and (folder / name).is_dir():
            try:
                checkpoints.append(SavedCheckpoint(folder / name, read_manifest(folder / name)))
            except CheckpointError as error:
                errors.append(error)
    return sorted(checkpoints, key=lambda checkpoint: checkpoint.order, reverse=True), errors


def _warn_about_fallback(error: CheckpointError) -> None:
    log.warning("%s; falling back to the previous checkpoint", error)


def newest_valid(
    candidates: Iterable[C],
    verify: Callable[[C], T],
    report: Callable[[CheckpointError], None] = _warn_about_fallback,
) -> T | None:
    """Return what `verify` returns for the first candidate that it does not refuse; None if it refuses all of them.

    Collective if `verify` is.

    Args:
        candidates: Checkpoints, newest first.
        verify: Raises CheckpointError for a damaged one.
        report: Receives the error of each damaged one.
    """
    for candidate in candidates:
        try:
            return verify(candidate)
        except CheckpointError as error:
            report(error)
    return None


def search_folder(path: Path) -> Path | None:
    """Return the folder whose newest checkpoint `--resume PATH` means; None if `path` itself is a checkpoint.

    Raises:
        CheckpointError: the path does not exist.
    """
    if not path.is_dir():
        raise CheckpointError(f"checkpoint.resume: {path} does not exist")
    if (path / MANIFEST).exists():
        return None
    if (path / CHECKPOINTS).is_dir():
        return path / CHECKPOINTS
    return path if list_checkpoints(path)[0] else None


def read_pointer(folder: Path, pointer: str) -> Path | None:
    """Return the target of `latest` or `best`, which lies in `folder`; None if there is no such pointer.

    Raises:
        CheckpointError: the pointer cannot be read, or does not contain the name of a checkpoint.
    """
    path = folder / pointer
    try:
        name = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not is_checkpoint_name(name):
        raise CheckpointError(f"{path}: {name[:80]!r} is not the name of a checkpoint")
    return folder / name


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint. Rename it first, so that an interrupted deletion never leaves part of it under its name."""
    deleted = folder.with_name(DELETED.format(folder.name))
    shutil.rmtree(deleted, ignore_errors=True)
    os.rename(folder, deleted)
    shutil.rmtree(deleted, ignore_errors=True)


def partial_folders(folder: Path) -> list[Path]:
    """Return the incomplete and partly deleted checkpoints that killed processes left in a folder."""
    return sorted(path for name in (PARTIAL, DELETED) for path in folder.glob(name.format(CHECKPOINT_GLOB)))
