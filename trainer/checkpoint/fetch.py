"""Copying a checkpoint from an object store into the run directory."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from trainer.checkpoint.context import CheckpointContext
from trainer.checkpoint.object_store import ObjectStore
from trainer.checkpoint.saved import PARTIAL, SavedCheckpoint, checkpoint_name, delete_checkpoint
from trainer.checkpoint.verify import refuse_mismatch, verify_checkpoint
from trainer.checkpoint_format import MANIFEST, Manifest, is_checkpoint, read_manifest, verify_files
from trainer.errors import CheckpointError, ConfigError, Problem
from trainer.files import sync_directory
from trainer.units import format_bytes

log = logging.getLogger(__name__)


def fetch_checkpoint(
    context: CheckpointContext, object_store: ObjectStore, *, is_required: bool
) -> SavedCheckpoint | None:
    """Copy the newest checkpoint of `object_store` into the run directory. Collective: all ranks must call it.

    Each rank copies and verifies a share of the files. A checkpoint that the run directory has already is verified,
    and copied again only if it is damaged.

    Returns:
        The checkpoint, or None if `object_store` has none.

    Raises:
        CheckpointError: `object_store` has none although `is_required`; a file cannot be copied, or is damaged.
        ConfigError: the checkpoint belongs to another run, or the run directory has another checkpoint of its name.
    """
    name = context.on_rank_zero(object_store.newest)
    if name is None:
        if is_required:
            raise CheckpointError(f"{object_store.url}: no checkpoint found")
        return None
    partial_folder = context.folder / PARTIAL.format("step-fetched")
    manifest = context.on_rank_zero(partial(_fetch_manifest, object_store, name, partial_folder))
    folder = context.folder / checkpoint_name(manifest.step)
    context.agree(lambda: refuse_mismatch(context, SavedCheckpoint(partial_folder, manifest)))
    if present := _verify_present(context, object_store, folder, manifest):
        return present
    log.info("copying %s of %s (%s)", folder.name, object_store.url, format_bytes(manifest.bytes))
    files = context.rank_share(manifest.files)

    def fetch_files() -> None:
        for file in files:
            object_store.fetch(name, file.name, partial_folder / file.name)

    context.agree(fetch_files)
    # Only once all files are there: the sizes of all of them are verified in addition to the hashes of this rank's.
    context.agree(lambda: verify_files(partial_folder, manifest, files))
    context.on_rank_zero(partial(_commit, partial_folder, folder))
    return SavedCheckpoint(folder, manifest)


def _fetch_manifest(object_store: ObjectStore, name: str, folder: Path) -> Manifest:
    folder.mkdir(parents=True, exist_ok=True)
    object_store.fetch(name, MANIFEST, folder / MANIFEST)
    return read_manifest(folder)


def _verify_present(
    context: CheckpointContext, object_store: ObjectStore, folder: Path, manifest: Manifest
) -> SavedCheckpoint | None:
    """Return the checkpoint in `folder` if it is the remote one and undamaged. Collective: all ranks must call it.

    Raises:
        ConfigError: it is another checkpoint.
    """
    if not context.on_rank_zero(lambda: is_checkpoint(folder)):
        return None
    try:
        if context.on_rank_zero(lambda: read_manifest(folder).files) == manifest.files:
            return verify_checkpoint(context, folder)
    except CheckpointError as error:
        log.warning("%s; copying it from %s again", error, object_store.url)
        return None
    reason = f"{folder} is not the checkpoint of that name in {object_store.url}"
    raise ConfigError(Problem("run.output_dir", reason, "Choose another folder"))


def _commit(partial_folder: Path, folder: Path) -> None:
    """Make a complete copy visible in one step."""
    if folder.exists():
        delete_checkpoint(folder)
    partial_folder.rename(folder)
    sync_directory(folder.parent)
