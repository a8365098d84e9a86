"""The run directory: what it says about earlier attempts, and what this one writes first."""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import shlex
import subprocess
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

from trainer.checkpoint_format import TOKENIZER, FileRecord
from trainer.config import LoadedConfig
from trainer.config.earlier_versions import ABSENT, ADDED_KEYS, METADATA_KEY, upgrade_config, value_at
from trainer.errors import ConfigError, Problem
from trainer.events import Event, append_event, read_events
from trainer.files import convert_bare_exceptions_to_os_errors, remove, replace_folder, replace_text, unwritable_reason
from trainer.final_model import find_damage
from trainer.run_config import is_non_negative_int, read_run_config
from trainer.sanitize import redact_json

log = logging.getLogger(__name__)

_PACKAGES = ("tessera", "torch", "deepspeed", "transformers", "tokenizers", "datasets", "wandb")
_IDENTITY_KEYS = ("run.seed", "model", "data", "deepspeed.train_batch_size", "deepspeed.optimizer.type")
"""What makes a run this run: with another value of these it cannot be gone on with. In addition: `ADDED_KEYS`."""

_NON_IDENTITY_KEYS = (
    "data.cache_dir", "data.max_document_bytes", "model.attention", "model.activation_checkpointing",
    "model.allow_unexpected_keys",
)  # fmt: skip


def _value(config: Mapping[str, Any], path: str) -> Any:
    for key in path.split("."):
        config = config.get(key, {}) if isinstance(config, Mapping) else {}
    return config


def _leaves(value: Any, path: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, below in value.items() for k, v in _leaves(below, f"{path}.{key}").items()}
    return {path: value}


def refuse_identity_change(old: Mapping[str, Any], loaded: LoadedConfig, where: str) -> None:
    """Compares a configuration with the one of a run that is to be gone on with.

    Args:
        old: resolved, by this version or an earlier one. where: it stands.

    Raises:
        ConfigError: naming each key that makes it another run, unless `checkpoint.allow_changed` names it.
    """
    found, old, new = [], redact_json(upgrade_config(old)), loaded.resolved()
    allowed = tuple(loaded.config.checkpoint.allow_changed)
    for path in (*_IDENTITY_KEYS, *(row.key for row in ADDED_KEYS if not is_within(row.key, _IDENTITY_KEYS))):
        before, now = _leaves(_value(old, path), path), _leaves(_value(new, path), path)
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) == now.get(key) or key in _NON_IDENTITY_KEYS or is_within(key, allowed):
                continue
            found.append(
                Problem(key, f"{json.dumps(now.get(key))} here, {json.dumps(before.get(key))} in {where}",
                        f"Take the old value{_setting(key, old)}, another run.output_dir to begin anew, or name the "
                        "key with --allow_change")
            )  # fmt: skip
    if found:
        raise ConfigError(found)


def refuse_checkpoint_past_end(loaded: LoadedConfig, step: int, where: str) -> None:
    """Refuse a checkpoint that is past the last step of the configuration, as far as that is known.

    Args:
        step: of the checkpoint. where: it is.

    Raises:
        ConfigError: it is.
    """
    steps = loaded.known_steps
    if steps is not None and step > steps:
        length = f"{steps} steps" if loaded.length_unit == "epochs" else str(steps)
        raise ConfigError(
            Problem(f"training.{loaded.length_unit}", f"{length}, and {where} is at step {step}",
                    "Take more steps, or name an earlier checkpoint with --resume")
        )  # fmt: skip


def _setting(key: str, old: Mapping[str, Any]) -> str:
    """The argument that sets an added key to its value in `old`, because users cannot look it up in an old file."""
    for row in ADDED_KEYS:
        if is_within(key, [row.key]) and (value := value_at(old, row.key)) is not ABSENT:
            return f" (--set {shlex.quote(f'{row.key}={json.dumps(value)}')})"
    return ""


def is_within(key: str, paths: Iterable[str]) -> bool:
    """Whether a dotted key is one of `paths`, or inside one."""
    return any(key == path or key.startswith(f"{path}.") for path in paths)


def package_versions(plugins: Sequence[str]) -> dict[str, str]:
    """Of Python, the packages that a run computes with, and those that its plugins belong to."""
    found = {"python": platform.python_version()}
    distributions = packages_distributions() if plugins else {}
    owners = [owner for name in plugins for owner in distributions.get(name.partition(".")[0], ())]
    for name in (*_PACKAGES, *owners):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _git_commit() -> str | None:
    try:
        asked = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() or None if asked.returncode == 0 else None


def run_metadata(loaded: LoadedConfig) -> dict[str, Any]:
    """What a run computes on: versions, commit, layout; and what it keeps of an earlier version."""
    topology = {axis: getattr(loaded.config.parallel, axis) for axis in ("pipeline", "tensor")}
    return {
        "versions": package_versions(loaded.config.run.plugins),
        "git_commit": _git_commit(),
        "world": {"processes": loaded.world_size, "data": loaded.data_ranks, **topology},
        "steps": loaded.known_steps,
        "kept_meanings": list(loaded.legacy_defaults.keys),
    }


def _refuse_unwritable(path: Path) -> None:
    if reason := unwritable_reason(path):
        raise ConfigError(Problem("run.output_dir", reason, "Choose another folder, or change its permissions"))


def _refuse_shorter_training(loaded: LoadedConfig, path: Path, step: int, epochs: float | None) -> None:
    """Refuse a length that a finished run has passed.

    Args:
        step, epochs: at which the run in `path` has finished; epochs is None where it counted in steps.
    """
    training = loaded.config.training
    remedy = "another run.output_dir, or --resume with an earlier checkpoint"
    if training.max_steps is not None and step > training.max_steps:
        reason = f"{training.max_steps}, but the run in {path} has finished at step {step}"
        raise ConfigError(Problem("training.max_steps", reason, f"Take more steps, {remedy}"))
    if training.epochs is not None and epochs is not None and epochs > training.epochs:
        reason = f"{training.epochs:g}, but the run in {path} has finished {epochs:g} epochs"
        raise ConfigError(Problem("training.epochs", reason, f"Take more epochs, {remedy}"))


@dataclass(frozen=True)
class RunDirectory:
    """Where a run writes."""

    path: Path
    attempt: int
    """How many times this run has been started, this time included."""

    finished_step: int | None
    """The step at which an earlier attempt finished; None if none did."""

    finished_epochs: float | None = None
    """`training.epochs` of that attempt, where it counted in epochs."""

    final_damage: str = ""
    """What is wrong with the model of the finished attempt; empty if nothing is, or none finished."""

    def is_finished(self, loaded: LoadedConfig) -> bool:
        """Whether there is nothing left to do."""
        return self._has_reached_end(loaded) and not self.final_damage

    def _has_reached_end(self, loaded: LoadedConfig) -> bool:
        """Known before the steps of `training.epochs` are counted: the same data, which identify the run, and the same
        epochs give the same number."""
        training = loaded.config.training
        if self.finished_step is None or loaded.config.checkpoint.resume != "auto":
            return False
        if training.epochs is not None:
            return self.finished_epochs == training.epochs
        return self.finished_step == training.max_steps

    @property
    def _wandb_run_file(self) -> Path:
        return self.path / "wandb" / "run-id"

    @property
    def wandb_run(self) -> str | None:
        """Id of this job's run at Weights & Biases, if it has one."""
        try:
            return self._wandb_run_file.read_text().strip() or None
        except (OSError, UnicodeDecodeError):
            return None

    def keep_wandb_run(self, run: str | None = None) -> str:
        """The same, chosen once: `run`, or a new one; so that the same command again continues the same run."""
        if self.wandb_run is None:
            self._wandb_run_file.parent.mkdir(parents=True, exist_ok=True)
            with self._disk_errors_as_config_errors(self._wandb_run_file):
                replace_text(self._wandb_run_file, run or uuid.uuid4().hex[:12])
        return self.wandb_run or ""

    def save_tokenizer(self, tokenizer: Any) -> None:
        """Writes the tokenizer, for whoever exports a checkpoint or begins from one.

        Raises:
            ConfigError: it cannot be written.
        """
        if tokenizer is None:
            return
        partial = self.path / f".{TOKENIZER}.partial"
        with self._disk_errors_as_config_errors(self.path / TOKENIZER), convert_bare_exceptions_to_os_errors():
            remove(partial)
            tokenizer.save_pretrained(str(partial))
            replace_folder(partial, self.path / TOKENIZER)

    @contextlib.contextmanager
    def _disk_errors_as_config_errors(self, path: Path) -> Iterator[None]:
        """Within, what the file system refuses is an error of the user's disk."""
        try:
            yield
        except OSError as error:
            reason = f"{path} cannot be written: {error.strerror or error}"
            raise ConfigError(
                Problem("run.output_dir", reason, "Free some space and run the same command again")
            ) from None

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def final(self) -> Path:
        return self.path / "final"

    @classmethod
    def examine(cls, loaded: LoadedConfig) -> RunDirectory:
        """Reads what earlier attempts left, and writes nothing.

        Raises:
            ConfigError: the directory belongs to another run, or to one that has finished behind the last step, or
                cannot be written to.
        """
        path = Path(loaded.config.run.output_dir).expanduser()
        _refuse_unwritable(path)
        events = read_events(path)
        attempt = 1 + max((row["attempt"] for row in events if is_non_negative_int(row.get("attempt"))), default=0)
        old = read_run_config(path)
        if old is None:
            return cls(path, attempt, None)
        refuse_identity_change(old, loaded, "the run directory")
        about = old.get(METADATA_KEY)
        about = about if isinstance(about, dict) else {}
        if is_non_negative_int(about.get("attempt")):
            attempt = max(attempt, about["attempt"] + 1)
        if not is_non_negative_int(finished := about.get("finished_step")):
            return cls(path, attempt, None)
        epochs = value_at(old, "training.epochs")
        epochs = float(epochs) if isinstance(epochs, int | float) else None
        if loaded.config.checkpoint.resume != "auto":
            return cls(path, attempt, finished, epochs)
        directory = cls(path, attempt, finished, epochs, find_damage(path / "final", about.get("final")))
        if not directory.final_damage:
            _refuse_shorter_training(loaded, path, finished, epochs)
        elif directory._has_reached_end(loaded):
            log.warning("%s: the run has finished, and its model is written again from the last checkpoint",
                        directory.final_damage)  # fmt: skip
        return directory

    def write_config(
        self, loaded: LoadedConfig, *, frame: Mapping[str, Any] | None, finished_step: int | None = None,
        final: Iterable[FileRecord] = (),
    ) -> None:  # fmt: skip
        """Writes `config.json`: the resolved configuration, and under one key what it ran on. Can be run again.

        Args:
            frame: special tokens around each document; None where the data were token files.
            final: files of the finished run's model, by which damage to them is noticed.

        Raises:
            ConfigError: it cannot be written; the old one is unchanged then.
        """
        about = {**run_metadata(loaded), "attempt": self.attempt, "finished_step": finished_step,
                 "document_frame": frame, "final": [asdict(file) for file in final]}  # fmt: skip
        text = json.dumps({**loaded.resolved(), METADATA_KEY: about}, indent=2)
        with self._disk_errors_as_config_errors(self.path / "config.json"):
            self.path.mkdir(parents=True, exist_ok=True)
            replace_text(self.path / "config.json", text + "\n")

    def record(self, event: Event, step: int, **details: Any) -> None:
        """Append to `events.jsonl`; call on rank 0 only. See `append_event`."""
        append_event(self.path, event, attempt=self.attempt, step=step, **details)
