"""The checkpoints of a run in progress: which one it goes on from, and when and how new ones are made."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from trainer.checkpoint.archive import (
    archive_checkpoints,
    archived_attempts,
    checkpoints_to_archive,
    last_checkpoint_event,
)
from trainer.checkpoint.load import load_state, scalar_state_of
from trainer.checkpoint.remote import Remote, is_remote
from trainer.checkpoint.retention import (
    CHECKPOINTS,
    EVALUATED_SAMPLES,
    LATEST,
    SavedCheckpoint,
    checkpoint_name,
    delete_checkpoint,
    expired,
    list_checkpoints,
    partial_folders,
    read_pointer,
    search_folder,
    update_pointers,
)
from trainer.checkpoint.writer import PARTIAL, CheckpointWriter, Staging, checkpoint_group, make_write_items
from trainer.checkpoint_format import MANIFEST, Manifest, WriteItem, is_checkpoint, read_manifest, verify_files
from trainer.config import LoadedConfig
from trainer.config.changes import changes
from trainer.config.earlier_versions import upgrade_config, value_at
from trainer.distributed import World, agree
from trainer.engine import Engine, Scalars, ScalarState, merge_scalars
from trainer.errors import CheckpointError, ConfigError, Problem, TesseraError
from trainer.files import sync_directory
from trainer.progress import Progress
from trainer.run_directory import (
    RunDirectory,
    is_within,
    refuse_checkpoint_past_end,
    refuse_identity_change,
    run_metadata,
)
from trainer.sanitize import redact_json
from trainer.units import format_bytes

log = logging.getLogger(__name__)

T = TypeVar("T")

_PROGRESS_SECONDS = 0.5
"""Between two looks at a thread that writes, by a main thread that waits for it."""


@dataclass(frozen=True)
class _Found:
    folder: Path
    manifest: Manifest


class Checkpoints:
    """Finds, restores, saves. All methods are called on all ranks."""

    def __init__(
        self, loaded: LoadedConfig, directory: RunDirectory, world: World, data: Mapping[str, Any],
        model: Mapping[str, Any], evaluated_samples: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """Args:
        data: what tells the training data and their order from others. model: what rebuilds it without its weights.
        evaluated: validation samples of each source.
        """
        self._loaded, self._directory, self._world = loaded, directory, world
        self._section = loaded.config.checkpoint
        self._data, self._model, self._about = (
            data,
            model,
            {**run_metadata(loaded), EVALUATED_SAMPLES: list(evaluated_samples)},
        )
        self._path = directory.path / CHECKPOINTS
        self._rank, self._ranks = world.topology.rank, world.topology.world_size
        self._group = checkpoint_group()
        upload = self._section.upload
        self._remote = self._agree(lambda: Remote(upload)) if upload else None
        self._staging = Staging()
        # In a thread of its own a save is no progress of the training that goes on, until that waits for it.
        self._advance = self._count_file if self._section.asynchronous else world.phases.advance
        self._thread: threading.Thread | None = None
        self._files_done = 0
        """By the thread, so far."""

        self._failure: CheckpointError | None = None
        self._fatal: Exception | None = None
        self._saved_step: int | None = None
        self._on_first(lambda: _clean_up(self._path))
        self._found = self._find()
        self._directory = replace(directory, attempt=self._on_first(self._attempt))
        if self._section.resume != "auto":
            self._on_first(self._archive)

    # Going on --------------------------------------------------------------------------------------------------------

    def _attempt(self) -> int:
        """Later than that of any checkpoint that is there: by it the newest are told."""
        earlier = [one.manifest.attempt for one in list_checkpoints(self._path)[0]] + archived_attempts(self._path)
        return max(self._directory.attempt, *(attempt + 1 for attempt in earlier), 1)

    @property
    def directory(self) -> RunDirectory:
        """The run directory, with the number of this attempt."""
        return self._directory

    @property
    def found(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return self._found is not None

    def restore(self, engine: Engine) -> Progress:
        """Gives the engine the state of the checkpoint that was found, if one was.

        Raises:
            CheckpointError: if the checkpoint and the model do not fit together.
        """
        self._world.phases.enter("resume")
        if self._found is None:
            return Progress()
        folder, manifest, start = self._found.folder, self._found.manifest, time.perf_counter()
        self._agree(lambda: load_state(engine.state, manifest, folder))
        engine.state.load_scalar_state(scalar_state_of(manifest))
        if manifest.wandb_run is not None and value_at(manifest.config, "run.name") == self._loaded.name:
            self._on_first(lambda: self._directory.keep_wandb_run(manifest.wandb_run))
        log.info("going on behind step %d, from %s (%s%s), read in %.1f s", manifest.step, folder,
                 format_bytes(manifest.bytes), _written_by(manifest), time.perf_counter() - start)  # fmt: skip
        for change in changes(redact_json(upgrade_config(manifest.config)), self._loaded.resolved()):
            log.info("changed since the last attempt: %s", change)
        return Progress(manifest.step, manifest.tokens, manifest.samples)

    def _find(self) -> _Found | None:
        resume = self._section.resume
        found: _Found | None = None
        if resume == "auto":
            damaged = False
            try:
                found = self._newest_valid(self._path, must=False)
            except CheckpointError as error:
                if self._remote is None:
                    raise
                damaged = True
                log.warning("%s. The copies in %s are looked at", error, self._remote.place)
            if found is None and self._remote is not None:
                found = self._fetch(self._remote, must=damaged)
            if found is None:
                self._on_first(self._refuse_lost)
            elif self._remote is not None:
                self._on_first(self._remote.warn_if_unreachable)
        elif is_remote(resume):
            found = self._fetch(Remote(resume, "checkpoint.resume"), must=True)
        elif resume != "never":
            found = self._named(Path(resume).expanduser())
        if found is not None:
            self._agree(lambda: self._refuse_mismatch(found))
            self._on_first(lambda: self._warn_about_other_samples(SavedCheckpoint(found.folder, found.manifest)))
        return found

    def _refuse_lost(self) -> None:
        """Refuses to start at step 1 where earlier attempts have saved; says so where none has."""
        finished, saved = self._directory.finished_step, last_checkpoint_event(self._directory.path)
        if finished is not None or saved is not None:
            done = f"has finished at step {finished}" if saved is None else f"was at step {saved['step']}"
            if saved is not None and saved["event"] == "save":
                done = f"has saved step {saved['step']} ({saved['time']})"
            others = sorted(self._path.glob("attempt-*"), key=lambda path: path.stat().st_mtime)
            aside = f", resume from {others[-1]} with --resume" if others else ""
            raise CheckpointError(
                f"{self._path}: no checkpoint is there, and the run {done}. Put the checkpoints back{aside}, or start "
                "again at step 1 with --resume never"
            )
        if self._directory.attempt > 1:
            log.info("no earlier attempt of this run has saved a checkpoint: starting again at step 1")

    def _warn_about_other_samples(self, resumed: SavedCheckpoint) -> None:
        evaluated_samples = self._about[EVALUATED_SAMPLES]
        if evaluated_samples and resumed.loss is not None and not resumed.is_comparable(evaluated_samples):
            log.warning("validation losses are over other samples than those of %s; `best` compares only losses over "
                        "the same samples", resumed.folder)  # fmt: skip

    def _archive(self) -> None:
        """Moves what this attempt does not continue out of the reach of retention and of its own saves."""
        resumed = None if self._found is None else SavedCheckpoint(self._found.folder, self._found.manifest)
        if left := checkpoints_to_archive(self._path, resumed):
            aside = archive_checkpoints(self._path, left, self._directory.attempt)
            log.warning(
                "checkpoint.resume %r leaves aside %d checkpoints of this run, up to %s: moved to %s. To resume from "
                "them, name that folder with --resume", self._section.resume, len(left), left[-1].name, aside,
            )  # fmt: skip

    def _named(self, path: Path) -> _Found | None:
        """The checkpoint that the user names, or the newest of the run that the user names; no other is taken."""

        folder = self._on_first(lambda: search_folder(path))
        return self._verified(path) if folder is None else self._newest_valid(folder, must=True)

    def _newest_valid(self, folder: Path, *, must: bool) -> _Found | None:
        """The newest checkpoint whose files are what its manifest says; says why newer ones are not taken."""

        def names() -> list[str]:
            kept, damaged = list_checkpoints(folder)
            for error in damaged:
                log.warning("%s", error)
            try:
                pointed = read_pointer(folder, LATEST)
                if kept and pointed != kept[0].folder:
                    log.warning("%s: points to %s, and the newest is %s", folder / "latest",
                                pointed.name if pointed else "nothing", kept[0].folder.name)  # fmt: skip
            except CheckpointError as error:
                log.warning("%s", error)
            lost = not kept and ((folder / LATEST).exists() or folder.is_symlink())
            if not kept and (damaged or must or lost):
                raise CheckpointError(f"{folder}: there is no sound checkpoint to go on from. To begin anew, take "
                                      "--resume never, or another run.output_dir")  # fmt: skip
            return [one.folder.name for one in kept]

        candidates = self._on_first(names)
        for name in candidates:
            try:
                return self._verified(folder / name)
            except CheckpointError as error:
                log.warning("%s. The one before is taken", error)
        if candidates:
            raise CheckpointError(
                f"{folder}: all of its {len(candidates)} checkpoints are damaged. To begin anew, take --resume never, "
                "or another run.output_dir"
            )
        return None

    def _verified(self, folder: Path) -> _Found:
        """The checkpoint in `folder`, each of its files read once by one of the ranks.

        Raises:
            CheckpointError: naming a file that is not what the manifest says.
        """

        def verify() -> Manifest:
            manifest = read_manifest(folder)
            verify_files(folder, manifest, manifest.files[self._rank :: self._ranks])
            return manifest

        return _Found(folder, self._agree(verify))

    def _refuse_mismatch(self, found: _Found) -> None:
        refuse_identity_change(found.manifest.config, self._loaded, str(found.folder))
        known, allowed = found.manifest.data, is_within("data.train", self._section.allow_changed)
        if known and known != json.loads(json.dumps(self._data)) and not allowed:
            raise ConfigError(
                Problem("data.train", f"its samples are others than those that {found.folder} was trained on",
                        "Take the same files, or --allow_change data.train to go on with other ones")
            )  # fmt: skip
        refuse_checkpoint_past_end(self._loaded, found.manifest.step, str(found.folder))
        samples, epochs = found.manifest.step * self._loaded.batch.batch_size, self._loaded.config.training.epochs
        if epochs is not None and found.manifest.samples != samples:
            raise ConfigError(
                Problem("training.epochs", f"{epochs:g}, and {found.folder} was trained with another train_batch_size "
                        f"({found.manifest.samples} samples in {found.manifest.step} steps): steps and epochs no "
                        "longer correspond", "Give training.max_steps instead")
            )  # fmt: skip

    def _fetch(self, remote: Remote, *, must: bool) -> _Found | None:
        """Copies the newest checkpoint of another place here; each rank some of its files."""
        name = self._on_first(remote.newest)
        if name is None:
            if must:
                raise CheckpointError(f"{remote.place}: there is no checkpoint")
            return None
        partial = self._path / PARTIAL.format("step-fetched")

        def manifest() -> Manifest:
            partial.mkdir(parents=True, exist_ok=True)
            remote.fetch(name, MANIFEST, partial / MANIFEST)
            return read_manifest(partial)

        found = self._on_first(manifest)
        folder = self._path / checkpoint_name(found.step)
        self._agree(lambda: self._refuse_mismatch(_Found(partial, found)))
        if self._on_first(lambda: is_checkpoint(folder)):
            try:
                if self._on_first(lambda: read_manifest(folder).files) == found.files:
                    return self._verified(folder)
            except CheckpointError as error:
                log.warning("%s. It is copied from %s again", error, remote.place)
            else:
                reason = f"{folder} is another checkpoint than that of {remote.place}"
                raise ConfigError(Problem("run.output_dir", reason, "Take another folder"))
        own = found.files[self._rank :: self._ranks]
        log.info("copying %s of %s (%s)", checkpoint_name(found.step), remote.place, format_bytes(found.bytes))

        def fetch() -> None:
            for file in own:
                remote.fetch(name, file.name, partial / file.name)

        self._agree(fetch)
        self._agree(lambda: verify_files(partial, found, own))

        def rename() -> None:
            if folder.exists():
                delete_checkpoint(folder)
            partial.rename(folder)
            sync_directory(self._path)

        self._on_first(rename)
        return _Found(folder, found)

    # Saving ----------------------------------------------------------------------------------------------------------

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be made behind this step."""
        every = self._section.interval(self._loaded.steps)
        return step == self._loaded.steps or bool(every and step % every == 0)

    def save(self, engine: Engine, progress: Progress, losses: Mapping[str, float | None]) -> None:
        """Makes a checkpoint. What cannot be written leaves the older ones as they are, and training goes on.

        Args:
            losses: of this very step, by split.
        """
        self._join()
        start = time.perf_counter()
        asynchronous = self._section.asynchronous
        numbers = engine.state.scalar_state()
        manifest = self._manifest(progress, losses, numbers)
        owned = engine.state.owned_chunks()
        entries = make_write_items(self._staging.copies(owned) if asynchronous else owned)
        if not asynchronous:
            self._write(entries, manifest, numbers.scalars, start)
            self._log_failure()
            return
        log.info("step %d: %.1f s to copy the state; it is written while training goes on", progress.step,
                 time.perf_counter() - start)  # fmt: skip

        def write() -> None:
            try:
                self._write(entries, manifest, numbers.scalars, start)
            except Exception as error:  # a broken connection between the ranks: no later save would succeed either
                self._fatal = error

        self._thread = threading.Thread(target=write, name="checkpoint")
        self._thread.start()

    def _manifest(self, progress: Progress, losses: Mapping[str, float | None], numbers: ScalarState) -> Manifest:
        """As far as this rank knows it before anything is written."""
        return Manifest(
            step=progress.step,
            attempt=self._directory.attempt,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            tokens=progress.tokens,
            samples=progress.samples,
            losses=dict(losses),
            config=self._loaded.resolved(),
            about=self._about,
            model=self._model,
            data=self._data,
            wandb_run=self._directory.wandb_run,
            numbers={"counters": numbers.counters, "scaler": numbers.scaler},
            files=(),
            tensors={},
        )

    def close(self) -> None:
        """Waits until what is being written is on the disk."""
        self._join()

    def refuse_unsaved(self, step: int) -> None:
        """Refuse to say that a step is saved when the disk has not taken it.

        Raises:
            ConfigError: the last save was not of this step, or has failed; the log says why.
        """
        if self._saved_step != step:
            reason = f"the state of step {step} could not be saved (the log says why), and the run stops here"
            raise ConfigError(Problem("run.output_dir", reason, "Mend it; the same command resumes from the checkpoint "
                                      "before"))  # fmt: skip

    def _join(self) -> None:
        while self._thread is not None:
            done = self._files_done
            self._thread.join(_PROGRESS_SECONDS)
            if self._files_done != done:
                self._world.phases.advance()
            if not self._thread.is_alive():
                self._thread = None
        if self._fatal is not None:
            raise self._fatal
        self._log_failure()

    def _count_file(self) -> None:
        self._files_done += 1

    def _log_failure(self) -> None:
        if self._failure is not None:
            log.error("%s. Training goes on, and older checkpoints are as they were", self._failure)
            self._failure = None

    def _write(
        self, entries: Sequence[WriteItem], manifest: Manifest, scalars: Mapping[str, Scalars], start: float
    ) -> None:
        path = self._path / checkpoint_name(manifest.step)
        folder = CheckpointWriter(path, self._rank, self._group, advance=self._advance)
        gathered: list[Any] = [None] * self._ranks
        dist.all_gather_object(gathered, dict(scalars), group=self._group)
        manifest = replace(manifest, numbers={**manifest.numbers, "scalars": merge_scalars(gathered)})
        try:
            complete = folder.write(entries, manifest)
        except CheckpointError as error:
            self._failure = error
            return
        self._saved_step = manifest.step
        gone: list[str] = []
        if self._rank == 0:
            seconds = time.perf_counter() - start
            log.info("checkpoint %s: %s in %.1f s", path, format_bytes(complete.bytes), seconds)
            self._directory.record(
                "save", manifest.step, checkpoint=path.name, bytes=complete.bytes, seconds=round(seconds, 3)
            )
            self._failure = _error_of(lambda: gone.extend(self._keep()))
        if self._remote is not None:
            self._upload(path, [file.name for file in folder.written], gone)

    def _keep(self) -> Iterator[str]:
        """Moves the pointers, and deletes what is superfluous. Gives the names of what has gone."""
        update_pointers(self._path)
        kept, _ = list_checkpoints(self._path)
        for one in expired(kept, self._section):
            log.info("deleting %s, as checkpoint.keep_last says", one.folder)
            delete_checkpoint(one.folder)
            yield one.folder.name

    def _upload(self, folder: Path, own: list[str], gone: list[str]) -> None:
        """Each rank copies its own files; then the first one the manifest; only then do older copies go."""
        remote = self._remote
        assert remote is not None
        withdrawn = [_error_of(lambda: remote.invalidate(folder.name)) if self._rank == 0 else None]
        dist.broadcast_object_list(withdrawn, src=0, group=self._group)

        def upload_own() -> None:
            for name in own:
                remote.upload(folder, [name])
                self._advance()

        # Only then the files, so that none of a new copy lies under an old one's manifest.
        failure = withdrawn[0] or _error_of(upload_own)
        failures: list[Any] = [None] * self._ranks
        dist.all_gather_object(failures, failure and str(failure), group=self._group)
        if self._rank == 0 and not any(failures):
            failure = _error_of(lambda: remote.upload(folder, [MANIFEST]))
            failure = failure or _error_of(lambda: remote.delete_checkpoint(*gone))
            failures = [failure and str(failure)]
        if found := [failure for failure in failures if failure]:
            self._failure = CheckpointError(f"{folder} was not copied to {remote.place}: {found[0]}")

    # All ranks -------------------------------------------------------------------------------------------------------

    def _agree(self, work: Callable[[], T]) -> T:
        """See `agree`; what a file system raises is an error of the checkpoint."""

        def attempt() -> T:
            result, error = _result_or_error(work)
            if error is not None:
                raise error
            return result  # type: ignore[return-value]

        return agree(attempt, self._group)

    def _on_first(self, work: Callable[[], T]) -> T:
        """The first rank's result, or error, on all ranks."""
        outcome: list[Any] = [_result_or_error(work) if self._rank == 0 else None]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        result, error = outcome[0]
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]


def _written_by(manifest: Manifest) -> str:
    """The layout that wrote a checkpoint, as far as its manifest says."""
    world = manifest.about.get("world")
    if not isinstance(world, Mapping):
        return ""
    processes, *axes = (world.get(key) for key in ("processes", "pipeline", "data", "tensor"))
    return ", written by {} processes: pipeline {} x data {} x tensor {}".format(processes, *axes)


def _result_or_error(work: Callable[[], T]) -> tuple[T | None, TesseraError | None]:
    try:
        return work(), None
    except TesseraError as error:
        return None, error
    except OSError as error:
        return None, CheckpointError(str(error))


def _error_of(work: Callable[[], object]) -> CheckpointError | None:
    """What went wrong; anything may, in somebody else's file system."""
    try:
        work()
    except Exception as error:
        return CheckpointError(f"{type(error).__name__}: {error}")
    return None


def _clean_up(folder: Path) -> None:
    """Removes what killed runs have left; what lacked only its name gets it."""
    for path in partial_folders(folder):
        try:
            found = read_manifest(path)
            verify_files(path, found)
        except CheckpointError:
            found = None
        if found is not None and not (folder / checkpoint_name(found.step)).exists():
            log.info("%s is complete, and is now %s", path, checkpoint_name(found.step))
            path.rename(folder / checkpoint_name(found.step))
        else:
            log.info("removing %s, left by a run that was killed", path)
            shutil.rmtree(path, ignore_errors=True)
