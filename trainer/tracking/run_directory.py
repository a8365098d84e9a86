"""The run directory: what it says about earlier attempts, and what this one writes first."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trainer.config import LoadedConfig
from trainer.config.load import METADATA_KEY
from trainer.errors import ConfigError, Problem

_PACKAGES = ("tessera", "torch", "deepspeed", "transformers", "tokenizers", "datasets", "wandb")
_IDENTITY = ("run.seed", "model", "data", "deepspeed.train_batch_size")
"""What makes a run this run: the same directory with another value of these is another run's."""

_NOT_IDENTITY = ("data.cache_dir", "model.attention", "model.activation_checkpointing")


def _value(config: dict[str, Any], path: str) -> Any:
    for key in path.split("."):
        config = config.get(key, {}) if isinstance(config, dict) else {}
    return config


def _leaves(value: Any, path: str) -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for key, below in value.items() for k, v in _leaves(below, f"{path}.{key}").items()}
    return {path: value}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[Problem]:
    found = []
    for path in _IDENTITY:
        before, now = _leaves(_value(old, path), path), _leaves(_value(new, path), path)
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key) and key not in _NOT_IDENTITY:
                found.append(Problem(key, f"{json.dumps(now.get(key))} here, {json.dumps(before.get(key))} in the "
                                     "run directory", "Take another run.output_dir, or the old value"))  # fmt: skip
    return found


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
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


@dataclass(frozen=True)
class RunDirectory:
    """Where a run writes."""

    path: Path
    attempt: int
    """How many times this run has been started, this time included."""

    finished_step: int | None
    """The step at which an earlier attempt finished; None if none did."""

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
            ConfigError: the directory belongs to another run, or to a finished one that cannot go on.
        """
        path = Path(loaded.config.run.output_dir).expanduser()
        try:
            old = json.loads((path / "config.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls(path, 1, None)
        except (OSError, ValueError) as error:
            raise ConfigError(
                Problem("run.output_dir", f"{path}/config.json cannot be read: {error}", "Take another folder")
            ) from None
        differences = _differences(old, loaded.resolved())
        if differences:
            raise ConfigError(differences)
        about = old.get(METADATA_KEY, {})
        finished = about.get("finished_step") if (path / "final").is_dir() else None
        if finished is not None and finished != loaded.config.training.max_steps:
            raise ConfigError(
                Problem("training.max_steps", f"{loaded.config.training.max_steps}, but the run in {path} has finished "
                        f"at step {finished}", "Take another run.output_dir")
            )  # fmt: skip
        return cls(path, int(about.get("attempt", 0)) + 1, finished)

    def write_config(self, loaded: LoadedConfig, finished_step: int | None = None) -> None:
        """Writes `config.json`: the resolved configuration, and under one key what it ran on. Can be run again."""
        topology = {axis: getattr(loaded.config.parallel, axis) for axis in ("pipeline", "tensor")}
        about = {
            "versions": _versions(),
            "git_commit": _git_commit(),
            "world": {"processes": loaded.world, "data": loaded.data_ranks, **topology},
            "attempt": self.attempt,
            "finished_step": finished_step,
        }
        text = json.dumps({**loaded.resolved(), METADATA_KEY: about}, indent=2)
        self.path.mkdir(parents=True, exist_ok=True)
        partial = self.path / ".config.json.partial"
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, self.path / "config.json")
