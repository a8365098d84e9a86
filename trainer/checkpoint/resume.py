"""Finding the checkpoint that an attempt resumes from, and restoring the engine from it."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from trainer.checkpoint.archive import (
    archive_checkpoints,
    archived_attempts,
    checkpoints_to_archive,
    last_checkpoint_event,
)
from trainer.checkpoint.context import CheckpointContext, RunRecord
from trainer.checkpoint.fetch import fetch_checkpoint
from trainer.checkpoint.load import load_state, scalar_state_of
from trainer.checkpoint.object_store import ObjectStore, is_object_store_url
from trainer.checkpoint.saved import (
    LATEST,
    SavedCheckpoint,
    checkpoint_name,
    list_checkpoints,
    newest_valid,
    partial_folders,
    read_pointer,
    search_folder,
)
from trainer.checkpoint.verify import refuse_mismatch, verify_checkpoint, warn_about_other_samples
from trainer.checkpoint_format import Manifest, read_manifest, verify_files
from trainer.config import LoadedConfig
from trainer.config.changes import changes
from trainer.config.earlier_versions import upgrade_config, value_at
from trainer.distributed import World
from trainer.engine import Engine
from trainer.errors import CheckpointError
from trainer.progress import Progress
from trainer.run_directory import RunDirectory
from trainer.sanitize import redact_json
from trainer.units import format_bytes

log = logging.getLogger(__name__)

_RESTART = "Start again at step 1 with --resume never, or choose another run.output_dir"


@dataclass(frozen=True)
class Resumption:
    """The state that an attempt starts from."""

    context: CheckpointContext
    """Context with the run directory numbered for this attempt."""

    checkpoint: SavedCheckpoint | None
    """Verified checkpoint; None if the attempt starts at step 1."""

    @property
    def directory(self) -> RunDirectory:
        """The run directory, with the number of this attempt."""
        return self.context.directory

    @property
    def tracker_states(self) -> Mapping[str, Mapping[str, str]]:
        """State of each tracker at the checkpoint; empty if that belongs to a run of another name."""
        if self.checkpoint is None:
            return {}
        manifest = self.checkpoint.manifest
        return manifest.trackers if value_at(manifest.config, "run.name") == self.context.loaded.name else {}


def find_checkpoint(loaded: LoadedConfig, directory: RunDirectory, world: World, record: RunRecord) -> Resumption:
    """Find and verify the checkpoint that `checkpoint.resume` selects. Collective: all ranks must call it.

    Removes leftovers of killed attempts, copies the checkpoint from an object store if necessary, and archives the
    checkpoints that this attempt does not continue.

    Args:
        loaded: Configuration of this attempt.
        directory: The run directory as `RunDirectory.examine` returns it.
        world: The joined world.
        record: What checkpoints record of the run, compared with what the checkpoint records.

    Raises:
        CheckpointError: on all ranks: the named checkpoint is missing or damaged; no checkpoint is left where there
            must be one.
        ConfigError: on all ranks: the checkpoint belongs to another run or is past the last step; a remote address
            cannot be reached.
    """
    context = CheckpointContext.open(loaded, directory, world, record)
    context.on_rank_zero(partial(_recover_partial_folders, context.folder))
    checkpoint = _select(context)
    if checkpoint is not None:
        context.agree(partial(refuse_mismatch, context, checkpoint))
        context.on_rank_zero(partial(warn_about_other_samples, context, checkpoint))
    attempt = context.on_rank_zero(partial(_attempt_number, context))
    context = replace(context, directory=replace(directory, attempt=attempt))
    if loaded.config.checkpoint.resume != "auto":
        context.on_rank_zero(partial(_archive, context, checkpoint))
    return Resumption(context, checkpoint)


def restore(resumption: Resumption, engine: Engine) -> Progress:
    """Load the state of the checkpoint, if there is one, into the engine. Collective: all ranks must call it.

    Returns:
        The progress at the checkpoint.

    Raises:
        CheckpointError: on all ranks: the checkpoint does not fit the model.
    """
    context, checkpoint = resumption.context, resumption.checkpoint
    context.world.phases.enter("resume")
    if checkpoint is None:
        return Progress()
    manifest, start = checkpoint.manifest, time.perf_counter()
    context.agree(lambda: load_state(engine.state, manifest, checkpoint.folder))
    engine.state.load_scalar_state(scalar_state_of(manifest))
    log.info(
        "resuming from step %d (%s, %s%s, read in %.1f s)",
        manifest.step,
        checkpoint.folder,
        format_bytes(manifest.bytes),
        _layout(manifest),
        time.perf_counter() - start,
    )
    for change in changes(redact_json(upgrade_config(manifest.config)), context.loaded.resolved()):
        log.info("changed since the last attempt: %s", change)
    return Progress(manifest.step, manifest.tokens, manifest.samples)


def _select(context: CheckpointContext) -> SavedCheckpoint | None:
    """Return the verified checkpoint that `checkpoint.resume` selects. Collective: all ranks must call it."""
    resume = context.loaded.config.checkpoint.resume
    if resume == "never":
        return None
    if resume == "auto":
        return _select_newest(context)
    if is_object_store_url(resume):
        object_store = context.agree(lambda: ObjectStore.connect(resume, "checkpoint.resume"))
        return fetch_checkpoint(context, object_store, is_required=True)
    path = Path(resume).expanduser()
    folder = context.on_rank_zero(lambda: search_folder(path))
    return verify_checkpoint(context, path) if folder is None else _newest_valid(context, folder, is_required=True)


def _select_newest(context: CheckpointContext) -> SavedCheckpoint | None:
    """Return the newest valid checkpoint of the run directory, or else of `checkpoint.upload`.

    Collective: all ranks must call it.

    Raises:
        CheckpointError: on all ranks: all checkpoints are damaged, or lost.
    """
    upload, has_damage = context.upload, False
    checkpoint = None
    try:
        checkpoint = _newest_valid(context, context.folder, is_required=False)
    except CheckpointError as error:
        if upload is None:
            raise
        has_damage = True
        log.warning("%s; looking for a copy in %s", error, upload.url)
    if checkpoint is None and upload is not None:
        checkpoint = fetch_checkpoint(context, upload, is_required=has_damage)
    if checkpoint is None:
        context.on_rank_zero(partial(_refuse_lost_checkpoints, context))
    elif upload is not None:
        context.on_rank_zero(upload.warn_if_unreachable)
    return checkpoint


def _newest_valid(context: CheckpointContext, folder: Path, *, is_required: bool) -> SavedCheckpoint | None:
    """Return the newest checkpoint in `folder` whose files match its manifest; log why newer ones do not qualify.

    Collective: all ranks must call it.

    Raises:
        CheckpointError: on all ranks: all checkpoints are damaged; there is none although `is_required`.
    """
    names = context.on_rank_zero(partial(_candidates, folder, is_required=is_required))
    newest = newest_valid([folder / name for name in names], partial(verify_checkpoint, context))
    if names and newest is None:
        raise CheckpointError(f"{folder}: all of its {len(names)} checkpoints are damaged. {_RESTART}")
    return newest


def _candidates(folder: Path, *, is_required: bool) -> list[str]:
    """Return the names of the checkpoints in `folder` whose manifest is valid, newest first.

    Raises:
        CheckpointError: there is none, but there are damaged ones, or traces of lost ones.
    """
    checkpoints, errors = list_checkpoints(folder)
    for error in errors:
        log.warning("%s", error)
    try:
        target = read_pointer(folder, LATEST)
        if checkpoints and target != checkpoints[0].folder:
            named = target.name if target else "no checkpoint"
            log.warning("%s: points to %s, not to the newest, %s", folder / LATEST, named, checkpoints[0].folder.name)
    except CheckpointError as error:
        log.warning("%s", error)
    is_lost = (folder / LATEST).exists() or folder.is_symlink()
    if not checkpoints and (errors or is_required or is_lost):
        raise CheckpointError(f"{folder}: no valid checkpoint to resume from. {_RESTART}")
    return [checkpoint.folder.name for checkpoint in checkpoints]


def _refuse_lost_checkpoints(context: CheckpointContext) -> None:
    """Refuse to start at step 1 where earlier attempts have saved; log that none has saved.

    Raises:
        CheckpointError: an earlier attempt has saved, resumed or finished.
    """
    finished, event = context.directory.finished_step, last_checkpoint_event(context.directory.path)
    if finished is None and event is None:
        if context.directory.attempt > 1:
            log.info("no earlier attempt of this run has saved a checkpoint: starting again at step 1")
        return
    if event is None:
        state = f"has finished at step {finished}"
    elif event["event"] == "save":
        state = f"has saved step {event['step']} ({event['time']})"
    else:
        state = f"was at step {event['step']}"
    archives = sorted(context.folder.glob("attempt-*"), key=lambda path: path.stat().st_mtime)
    alternative = f", resume from {archives[-1]} with --resume" if archives else ""
    raise CheckpointError(
        f"{context.folder}: no checkpoint found, but the run {state}. Restore the checkpoints{alternative}, or start "
        "again at step 1 with --resume never"
    )


def _recover_partial_folders(folder: Path) -> None:
    """Remove leftovers of killed attempts; rename a complete checkpoint that only lacks its final name."""
    for path in partial_folders(folder):
        manifest: Manifest | None = None
        try:
            manifest = read_manifest(path)
            verify_files(path, manifest)
        except CheckpointError:
            manifest = None
        if manifest is not None and not (folder / checkpoint_name(manifest.step)).exists():
            log.info("%s is complete: renaming it to %s", path, checkpoint_name(manifest.step))
            path.rename(folder / checkpoint_name(manifest.step))
        else:
            log.info("removing %s, left by a killed run", path)
            shutil.rmtree(path, ignore_errors=True)


def _attempt_number(context: CheckpointContext) -> int:
    """Return a number above those of all checkpoints, because checkpoints are ordered by attempt and step."""
    saved = [checkpoint.manifest.attempt for checkpoint in list_checkpoints(context.folder)[0]]
    return max(context.directory.attempt, *(attempt + 1 for attempt in (*saved, *archived_attempts(context.folder))), 1)


def _archive(context: CheckpointContext, resumed: SavedCheckpoint | None) -> None:
    """Move the checkpoints that this attempt does not continue out of reach of retention and later saves."""
    paths = checkpoints_to_archive(context.folder, resumed)
    if not paths:
        return
    archive = archive_checkpoints(context.folder, paths, context.directory.attempt)
    log.warning(
        "archived %d checkpoints up to %s in %s, because checkpoint.resume=%r does not continue them. To resume from "
        "them, name that folder with --resume",
        len(paths),
        paths[-1].name,
        archive,
        context.loaded.config.checkpoint.resume,
    )


def _layout(manifest: Manifest) -> str:
    """Describe the layout that wrote a checkpoint, if its manifest records it."""
    world = manifest.about.get("world")
    if not isinstance(world, Mapping):
        return ""
    processes, *sizes = (world.get(key) for key in ("processes", "pipeline", "data", "tensor"))
    return ", written by {} processes: pipeline {} x data {} x tensor {}".format(processes, *sizes)
