"""Checks of a checkpoint before a run resumes from it: undamaged, of the same run, not past the end."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from trainer.checkpoint.context import CheckpointContext
from trainer.checkpoint.saved import SavedCheckpoint
from trainer.checkpoint_format import Manifest, read_manifest, verify_files
from trainer.errors import ConfigError, Problem
from trainer.run_identity import is_within, refuse_checkpoint_past_end, refuse_identity_change

log = logging.getLogger(__name__)


def verify_checkpoint(context: CheckpointContext, folder: Path) -> SavedCheckpoint:
    """Read every file of a checkpoint once, divided among the ranks. Collective: all ranks must call it.

    Raises:
        CheckpointError: on all ranks: names a file that differs from the manifest.
    """

    def verify() -> Manifest:
        manifest = read_manifest(folder)
        verify_files(folder, manifest, context.rank_share(manifest.files))
        return manifest

    return SavedCheckpoint(folder, context.agree(verify))


def refuse_mismatch(context: CheckpointContext, checkpoint: SavedCheckpoint) -> None:
    """Compare a checkpoint with the configuration and the data of this attempt.

    Raises:
        ConfigError: it belongs to another run, to other training data, or is past the last step.
    """
    loaded, folder, manifest = context.loaded, checkpoint.folder, checkpoint.manifest
    refuse_identity_change(manifest.config, loaded, str(folder))
    is_allowed = is_within("data.train", loaded.config.checkpoint.allow_changed)
    # The manifest's fingerprint has been through JSON, which turns tuples into lists.
    if manifest.data and manifest.data != json.loads(json.dumps(context.record.data)) and not is_allowed:
        reason = f"the training data differs from that of {folder}"
        remedy = "Use the same files, or resume with other data by --allow_change data.train"
        raise ConfigError(Problem("data.train", reason, remedy))
    refuse_checkpoint_past_end(loaded, manifest.step, str(folder))
    samples, epochs = manifest.step * loaded.batch.batch_size, loaded.config.training.epochs
    if epochs is not None and manifest.samples != samples:
        reason = (
            f"{epochs:g}, and {folder} was trained with another train_batch_size ({manifest.samples} samples in "
            f"{manifest.step} steps): steps and epochs no longer correspond"
        )
        raise ConfigError(Problem("training.epochs", reason, "Set training.max_steps instead"))


def warn_about_other_samples(context: CheckpointContext, checkpoint: SavedCheckpoint) -> None:
    """Warn if the validation loss of a checkpoint is not comparable with those of this attempt."""
    samples = context.record.evaluated_samples
    if samples and checkpoint.loss is not None and not checkpoint.is_comparable(samples):
        log.warning(
            "validation losses are over other samples than those of %s; `best` compares only losses over the same "
            "samples",
            checkpoint.folder,
        )
