"""Which checkpoint a run would resume from, as one process can tell without reading its tensors."""

from __future__ import annotations

import logging
from pathlib import Path

from trainer.checkpoint.remote import Remote, is_remote
from trainer.checkpoint.retention import CHECKPOINTS, SavedCheckpoint, list_checkpoints, search_folder
from trainer.checkpoint_format import read_manifest, verify_sizes
from trainer.config import LoadedConfig
from trainer.errors import CheckpointError
from trainer.run_directory import refuse_checkpoint_past_end, refuse_identity_change

log = logging.getLogger(__name__)


def preview_resume(loaded: LoadedConfig) -> SavedCheckpoint | None:
    """The checkpoint that `loaded` resumes from; None if it starts from the beginning, or from a copy elsewhere.

    Of the checkpoint its manifest is read, and its files are there with their sizes; hashes are verified when the run
    starts.

    Raises:
        CheckpointError: there is none where one is named. ConfigError: it is another run's.
    """
    resume = loaded.config.checkpoint.resume
    if resume == "never":
        return None
    if is_remote(resume):
        place = Remote(resume, "checkpoint.resume")
        if place.newest() is None:
            raise CheckpointError(f"{place.place}: there is no checkpoint")
        return None
    output = Path(loaded.config.run.output_dir).expanduser()
    found = _newest(output / CHECKPOINTS) if resume == "auto" else _named(Path(resume).expanduser())
    if found is None:
        return None
    refuse_identity_change(found.manifest.config, loaded, str(found.folder))
    refuse_checkpoint_past_end(loaded, found.manifest.step, str(found.folder))
    return found


def _named(path: Path) -> SavedCheckpoint:
    folder = search_folder(path)
    if folder is None:
        manifest = read_manifest(path)
        verify_sizes(path, manifest)
        return SavedCheckpoint(path, manifest)
    if (found := _newest(folder)) is None:
        raise CheckpointError(f"{folder}: there is no sound checkpoint to resume from")
    return found


def _newest(folder: Path) -> SavedCheckpoint | None:
    """The newest checkpoint whose files have their sizes."""
    kept, damaged = list_checkpoints(folder)
    for one in kept:
        try:
            verify_sizes(one.folder, one.manifest)
        except CheckpointError as error:
            damaged.append(error)
        else:
            return one
    if damaged:
        raise CheckpointError(f"{folder}: there is no sound checkpoint to resume from: {damaged[0]}")
    return None
