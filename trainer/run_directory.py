"""The run directory: the state left by earlier attempts, and the first files of an attempt."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from trainer.checkpoint_format import FileRecord
from trainer.config import LoadedConfig
from trainer.config.earlier_versions import METADATA_KEY, value_at
from trainer.errors import ConfigError, Problem
from trainer.events import Event, append_event, read_events
from trainer.files import convert_bare_exceptions_to_os_errors, remove, replace_folder, replace_text, unwritable_reason
from trainer.final_model import find_damage
from trainer.run_config import is_non_negative_int, read_run_config
from trainer.run_identity import refuse_identity_change
from trainer.run_layout import FINAL, METRICS, TOKENIZER
from trainer.run_metadata import run_metadata

log = logging.getLogger(__name__)


class _Tokenizer(Protocol):
    """A tokenizer of transformers, which takes seconds to import."""

    def save_pretrained(self, save_directory: str) -> object: ...


@dataclass(frozen=True)
class RunDirectory:
    """The directory that a run writes to, and the progress of earlier attempts."""

    path: Path
    attempt: int
    """Number of this attempt, from 1."""

    finished_step: int | None
    """Step at which an earlier attempt finished; None if none did."""

    finished_epochs: float | None = None
    """`training.epochs` of that attempt, where it counted in epochs."""

    final_damage: str = ""
    """Damage to the model of the finished attempt; empty if there is none, or no attempt finished."""

    @classmethod
    def examine(cls, loaded: LoadedConfig) -> RunDirectory:
        """Read the state left by earlier attempts; write nothing.

        Raises:
            ConfigError: the directory belongs to another run or to one that finished past the last step, or is not
                writable.
        """
        path = Path(loaded.config.run.output_dir).expanduser()
        _refuse_unwritable(path)
        attempts = [event["attempt"] for event in read_events(path) if is_non_negative_int(event.get("attempt"))]
        attempt = 1 + max(attempts, default=0)
        old = read_run_config(path)
        if old is None:
            return cls(path, attempt, None)
        refuse_identity_change(old, loaded, "the run directory")
        metadata = old.get(METADATA_KEY)
        metadata = metadata if isinstance(metadata, dict) else {}
        if is_non_negative_int(metadata.get("attempt")):
            attempt = max(attempt, metadata["attempt"] + 1)
        if not is_non_negative_int(finished := metadata.get("finished_step")):
            return cls(path, attempt, None)
        epochs = value_at(old, "training.epochs")
        epochs = float(epochs) if isinstance(epochs, int | float) else None
        if loaded.config.checkpoint.resume != "auto":
            return cls(path, attempt, finished, epochs)
        directory = cls(path, attempt, finished, epochs, find_damage(path / FINAL, metadata.get("final")))
        if not directory.final_damage:
            _refuse_shorter_training(loaded, path, finished, epochs)
        elif directory._has_reached_end(loaded):
            log.warning("%s: rewriting the model of the finished run from its last checkpoint", directory.final_damage)
        return directory

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    @property
    def final(self) -> Path:
        return self.path / FINAL

    def is_finished(self, loaded: LoadedConfig) -> bool:
        """Return True if the run has finished."""
        return self._has_reached_end(loaded) and not self.final_damage

    def _has_reached_end(self, loaded: LoadedConfig) -> bool:
        """Return True if an earlier attempt finished at the configured length.

        This is known before the steps of `training.epochs` are counted: data identify a run, and the same epochs of the
        same data have the same number of steps.
        """
        training = loaded.config.training
        if self.finished_step is None or loaded.config.checkpoint.resume != "auto":
            return False
        if training.epochs is not None:
            return self.finished_epochs == training.epochs
        return self.finished_step == training.max_steps

    def write_config(
        self,
        loaded: LoadedConfig,
        *,
        frame: Mapping[str, Any] | None,
        finished_step: int | None = None,
        final: Iterable[FileRecord] = (),
    ) -> None:
        """Write `config.json`: the resolved configuration, which is valid input, and metadata under one more key.

        Args:
            loaded: Configuration of this attempt.
            frame: Special tokens around each document; None if the data were token files.
            finished_step: Step at which the run has finished; None while it trains.
            final: Files of the finished run's model, by which later damage is detected.

        Raises:
            ConfigError: the file cannot be written; the old file is unchanged.
        """
        metadata = {
            **run_metadata(loaded),
            "attempt": self.attempt,
            "finished_step": finished_step,
            "document_frame": frame,
            "final": [asdict(file) for file in final],
        }
        text = json.dumps({**loaded.resolved(), METADATA_KEY: metadata}, indent=2)
        path = self.path / "config.json"
        with _disk_errors_as_config_errors(path):
            self.path.mkdir(parents=True, exist_ok=True)
            replace_text(path, text + "\n")

    def save_tokenizer(self, tokenizer: _Tokenizer | None) -> None:
        """Write the tokenizer, for exporting a checkpoint or starting another run from one.

        Raises:
            ConfigError: the tokenizer cannot be written.
        """
        if tokenizer is None:
            return
        folder = self.path / TOKENIZER
        partial = folder.with_name(f".{TOKENIZER}.partial")
        with _disk_errors_as_config_errors(folder), convert_bare_exceptions_to_os_errors():
            remove(partial)
            tokenizer.save_pretrained(str(partial))
            replace_folder(partial, folder)

    def record(self, event: Event, step: int, **details: object) -> None:
        """Append to `events.jsonl`; call it on rank 0 only. See `append_event`."""
        append_event(self.path, event, attempt=self.attempt, step=step, **details)


@contextlib.contextmanager
def _disk_errors_as_config_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while writing `path` into an error that the user can fix."""
    try:
        yield
    except OSError as error:
        reason = f"{path} cannot be written: {error.strerror or error}"
        raise ConfigError(Problem("run.output_dir", reason, "Free some space and run the same command again")) from None


def _refuse_unwritable(path: Path) -> None:
    if reason := unwritable_reason(path):
        raise ConfigError(Problem("run.output_dir", reason, "Choose another folder, or change its permissions"))


def _refuse_shorter_training(loaded: LoadedConfig, path: Path, step: int, epochs: float | None) -> None:
    """Refuse a length that a finished run has passed.

    Args:
        loaded: Configuration of this attempt.
        path: Path of the run directory.
        step: Step at which the run has finished.
        epochs: Epochs that the run has finished; None if it counted in steps.
    """
    training = loaded.config.training
    remedy = "choose another run.output_dir, or resume from an earlier checkpoint with --resume"
    if training.max_steps is not None and step > training.max_steps:
        reason = f"{training.max_steps}, but the run in {path} has finished at step {step}"
        raise ConfigError(Problem("training.max_steps", reason, f"Train for more steps, {remedy}"))
    if training.epochs is not None and epochs is not None and epochs > training.epochs:
        reason = f"{training.epochs:g}, but the run in {path} has finished {epochs:g} epochs"
        raise ConfigError(Problem("training.epochs", reason, f"Train for more epochs, {remedy}"))
