"""Saving checkpoints while a run trains: when, in the foreground or the background, and what expires afterwards."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import Any

import torch.distributed as dist

from trainer.checkpoint.context import CheckpointContext
from trainer.checkpoint.retention import expired, update_pointers
from trainer.checkpoint.saved import EVALUATED_SAMPLES, checkpoint_name, delete_checkpoint, list_checkpoints
from trainer.checkpoint.upload import error_of, upload_checkpoint
from trainer.checkpoint.writer import CheckpointWriter, StagingBuffers, sort_by_element_size
from trainer.checkpoint_format import Manifest, TensorChunk
from trainer.engine import Engine, Scalars, ScalarState, merge_scalars
from trainer.errors import CheckpointError, ConfigError, Problem
from trainer.progress import Progress
from trainer.run_metadata import run_metadata
from trainer.units import format_bytes

log = logging.getLogger(__name__)

_PROGRESS_SECONDS = 0.5
"""Interval at which the main thread, waiting for the writer thread, notes its progress for the watchdog."""


class CheckpointSaver:
    """Saves the checkpoints of one attempt. A failed save changes no older checkpoint and does not end the run."""

    def __init__(self, context: CheckpointContext) -> None:
        self._context, self._section = context, context.loaded.config.checkpoint
        self._staging = StagingBuffers()
        # Only the main thread may note progress of a phase; the writer thread counts files instead.
        self._advance = self._count_file if self._section.asynchronous else context.world.phases.advance
        self._thread: threading.Thread | None = None
        self._files_done = 0
        """Files that the writer thread has written or verified."""

        self._failure: CheckpointError | None = None
        """Failure of the last save, until it is logged."""

        self._fatal: Exception | None = None
        """Ends the run: no later save could succeed."""

        self._saved_step: int | None = None

    def is_due(self, step: int) -> bool:
        """Return True if a checkpoint must be saved after this step."""
        steps = self._context.loaded.steps
        interval = self._section.interval(steps)
        return step == steps or bool(interval and step % interval == 0)

    def save(
        self,
        engine: Engine,
        progress: Progress,
        losses: Mapping[str, float | None],
        *,
        trackers: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """Save a checkpoint. Collective: all ranks must call it.

        If `checkpoint.asynchronous`, return once the state is copied; a thread writes it while training continues. An
        earlier save that is still being written is waited for.

        Args:
            engine: Holds the state to save.
            progress: Progress of training.
            losses: Losses of this step, by split.
            trackers: State of the experiment trackers; only rank 0's is saved.
        """
        self.close()
        start = time.perf_counter()
        scalar_state = engine.state.scalar_state()
        manifest = self._manifest(progress, losses, scalar_state, trackers or {})
        owned = engine.state.owned_chunks()
        if not self._section.asynchronous:
            self._write(sort_by_element_size(owned), manifest, scalar_state.scalars, start)
            self._log_failure()
            return
        chunks = sort_by_element_size(self._staging.copy(owned))
        seconds = time.perf_counter() - start
        log.info("step %d: copied the state in %.1f s; writing it in the background", progress.step, seconds)
        work = partial(self._write, chunks, manifest, scalar_state.scalars, start)
        self._thread = threading.Thread(target=self._run_in_background, args=(work,), name="checkpoint")
        self._thread.start()

    def close(self) -> None:
        """Wait until the checkpoint that is being written is on the disk.

        Raises:
            Exception: the writer thread lost the connection to another rank.
        """
        while self._thread is not None:
            done = self._files_done
            self._thread.join(_PROGRESS_SECONDS)
            if self._files_done != done:
                self._context.world.phases.advance()
            if not self._thread.is_alive():
                self._thread = None
        if self._fatal is not None:
            raise self._fatal
        self._log_failure()

    def refuse_unsaved(self, step: int) -> None:
        """Check that the state of a step is on the disk.

        Raises:
            ConfigError: the last save was of another step, or has failed; the log has the reason.
        """
        if self._saved_step != step:
            reason = f"the state of step {step} could not be saved (see the log), and the run stops here"
            remedy = "Fix the cause; the same command resumes from the previous checkpoint"
            raise ConfigError(Problem("run.output_dir", reason, remedy))

    def _manifest(
        self,
        progress: Progress,
        losses: Mapping[str, float | None],
        scalar_state: ScalarState,
        trackers: Mapping[str, Mapping[str, str]],
    ) -> Manifest:
        """Return the manifest without files, tensors, and the scalars of other ranks."""
        return Manifest(
            step=progress.step,
            attempt=self._context.directory.attempt,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            tokens=progress.tokens,
            samples=progress.samples,
            losses=dict(losses),
            config=self._context.loaded.resolved(),
            about=self._about if self._context.rank == 0 else {},
            model=self._context.record.model,
            data=self._context.record.data,
            trackers=trackers,
            scalar_state={"counters": scalar_state.counters, "scaler": scalar_state.scaler},
            files=(),
            tensors={},
        )

    @cached_property
    def _about(self) -> dict[str, Any]:
        metadata = run_metadata(self._context.loaded)
        return {**metadata, EVALUATED_SAMPLES: list(self._context.record.evaluated_samples)}

    def _run_in_background(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # a broken connection between the ranks: no later save would succeed
            self._fatal = error

    def _count_file(self) -> None:
        self._files_done += 1

    def _log_failure(self) -> None:
        if self._failure is not None:
            log.error("%s. Training continues; older checkpoints are unchanged", self._failure)
            self._failure = None

    def _write(
        self, chunks: Sequence[TensorChunk], manifest: Manifest, scalars: Mapping[str, Scalars], start: float
    ) -> None:
        """Write, apply the retention policy, upload. Collective: all ranks must call it, from the same thread."""
        context = self._context
        folder = context.folder / checkpoint_name(manifest.step)
        writer = CheckpointWriter(folder, context.rank, context.group, advance=self._advance)
        gathered: list[Mapping[str, Scalars]] = [{} for _ in range(context.world_size)]
        dist.all_gather_object(gathered, dict(scalars), group=context.group)
        manifest = replace(manifest, scalar_state={**manifest.scalar_state, "scalars": merge_scalars(gathered)})
        try:
            complete = writer.write(chunks, manifest)
        except CheckpointError as error:
            self._failure = error
            return
        self._saved_step = manifest.step
        deleted: list[str] = []
        if context.rank == 0:
            seconds = time.perf_counter() - start
            log.info("saved checkpoint %s (%s) in %.1f s", folder, format_bytes(complete.bytes), seconds)
            details = {"checkpoint": folder.name, "bytes": complete.bytes, "seconds": round(seconds, 3)}
            context.directory.record("save", manifest.step, **details)
            self._failure = error_of(partial(self._apply_retention, deleted))
        if context.upload is not None:
            files = [file.name for file in writer.written]
            failure = upload_checkpoint(context, folder, files, deleted=deleted, advance=self._advance)
            self._failure = failure or self._failure

    def _apply_retention(self, deleted: list[str]) -> None:
        """Update the pointers, delete expired checkpoints, and append their names to `deleted`."""
        folder = self._context.folder
        update_pointers(folder)
        for checkpoint in expired(list_checkpoints(folder)[0], self._section):
            log.info("deleting %s, expired under checkpoint.keep_last", checkpoint.folder)
            delete_checkpoint(checkpoint.folder)
            deleted.append(checkpoint.folder.name)
