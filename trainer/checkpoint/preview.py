"""The checkpoint that a run would resume from, found by one process without reading tensors."""

from __future__ import annotations

from pathlib import Path

from trainer.checkpoint.object_store import ObjectStore, is_object_store_url
from trainer.checkpoint.saved import SavedCheckpoint, list_checkpoints, newest_valid, search_folder
from trainer.checkpoint_format import read_manifest, verify_sizes
from trainer.config import LoadedConfig
from trainer.errors import CheckpointError
from trainer.run_identity import refuse_checkpoint_past_end, refuse_identity_change
from trainer.run_layout import CHECKPOINTS


def preview_resume(loaded: LoadedConfig) -> SavedCheckpoint | None:
    """Return the checkpoint that `loaded` resumes from; None if it starts at step 1 or resumes from a remote copy.

    Its manifest is read, and the sizes of its files are checked; the run itself verifies the hashes.

    Raises:
        CheckpointError: `checkpoint.resume` names a checkpoint that is missing or damaged.
        ConfigError: the checkpoint belongs to another run, or is past the last step.
    """
    resume = loaded.config.checkpoint.resume
    if resume == "never":
        return None
    if is_object_store_url(resume):
        object_store = ObjectStore.connect(resume, "checkpoint.resume")
        if object_store.newest() is None:
            raise CheckpointError(f"{object_store.url}: no checkpoint found")
        return None
    output = Path(loaded.config.run.output_dir).expanduser()
    checkpoint = _newest(output / CHECKPOINTS) if resume == "auto" else _named(Path(resume).expanduser())
    if checkpoint is None:
        return None
    refuse_identity_change(checkpoint.manifest.config, loaded, str(checkpoint.folder))
    refuse_checkpoint_past_end(loaded, checkpoint.manifest.step, str(checkpoint.folder))
    return checkpoint


def _named(path: Path) -> SavedCheckpoint:
    folder = search_folder(path)
    if folder is None:
        return _with_verified_sizes(SavedCheckpoint(path, read_manifest(path)))
    newest = _newest(folder)
    if newest is None:
        raise CheckpointError(f"{folder}: no valid checkpoint to resume from")
    return newest


def _newest(folder: Path) -> SavedCheckpoint | None:
    """Return the newest checkpoint whose files have the sizes in its manifest."""
    checkpoints, errors = list_checkpoints(folder)
    newest = newest_valid(checkpoints, _with_verified_sizes, errors.append)
    if newest is None and errors:
        raise CheckpointError(f"{folder}: no valid checkpoint to resume from: {errors[0]}")
    return newest


def _with_verified_sizes(checkpoint: SavedCheckpoint) -> SavedCheckpoint:
    verify_sizes(checkpoint.folder, checkpoint.manifest)
    return checkpoint
