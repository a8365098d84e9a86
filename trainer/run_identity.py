"""Configuration keys that identify a run, and the refusal to resume with different values."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from trainer.config import LoadedConfig
from trainer.config.earlier_versions import ABSENT, ADDED_KEYS, upgrade_config, value_at
from trainer.errors import ConfigError, Problem
from trainer.sanitize import redact_json

_IDENTITY_KEYS = ("run.seed", "model", "data", "deepspeed.train_batch_size", "deepspeed.optimizer.type")
"""Configuration keys that identify a run. Resuming with a different value is refused. In addition: `ADDED_KEYS`."""

_NON_IDENTITY_KEYS = (
    "data.cache_dir",
    "data.max_document_bytes",
    "model.attention",
    "model.activation_checkpointing",
    "model.allow_unexpected_keys",
)


def refuse_identity_change(old: Mapping[str, Any], loaded: LoadedConfig, source: str) -> None:
    """Compare a configuration with that of a run to resume.

    Args:
        old: Resolved configuration of the run, written by this version or an earlier one.
        loaded: Configuration of this attempt.
        source: Source of `old`, for the message.

    Raises:
        ConfigError: names each identity key that differs, unless `checkpoint.allow_changed` names it.
    """
    problems, old, new = [], redact_json(upgrade_config(old)), loaded.resolved()
    allowed = tuple(loaded.config.checkpoint.allow_changed)
    for path in (*_IDENTITY_KEYS, *(row.key for row in ADDED_KEYS if not is_within(row.key, _IDENTITY_KEYS))):
        before, now = _leaves(_value(old, path), path), _leaves(_value(new, path), path)
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) == now.get(key) or key in _NON_IDENTITY_KEYS or is_within(key, allowed):
                continue
            reason = f"{json.dumps(now.get(key))} here, {json.dumps(before.get(key))} in {source}"
            remedy = (
                f"Use the old value{_setting(key, old)}, choose another run.output_dir for a new run, or name the key "
                "with --allow_change"
            )
            problems.append(Problem(key, reason, remedy))
    if problems:
        raise ConfigError(problems)


def refuse_checkpoint_past_end(loaded: LoadedConfig, step: int, checkpoint: str) -> None:
    """Refuse a checkpoint past the last step of the configuration, where that is known.

    Args:
        loaded: Configuration of this attempt.
        step: Step of the checkpoint.
        checkpoint: Its location, for the message.

    Raises:
        ConfigError: the checkpoint is past the last step.
    """
    steps = loaded.known_steps
    if steps is not None and step > steps:
        length = f"{steps} steps" if loaded.length_unit == "epochs" else str(steps)
        reason = f"{length}, and {checkpoint} is at step {step}"
        remedy = "Train for more steps, or name an earlier checkpoint with --resume"
        raise ConfigError(Problem(f"training.{loaded.length_unit}", reason, remedy))


def is_within(key: str, paths: Iterable[str]) -> bool:
    """Return True if a dotted key is one of `paths`, or below one."""
    return any(key == path or key.startswith(f"{path}.") for path in paths)


def _value(config: Mapping[str, Any], path: str) -> object:
    value: object = config
    for key in path.split("."):
        value = value.get(key, {}) if isinstance(value, Mapping) else {}
    return value


def _leaves(value: object, path: str) -> dict[str, object]:
    if isinstance(value, dict):
        return {k: v for key, child in value.items() for k, v in _leaves(child, f"{path}.{key}").items()}
    return {path: value}


def _setting(key: str, old: Mapping[str, Any]) -> str:
    """Return the argument that sets an added key to its value in `old`, because no old file shows that value."""
    for row in ADDED_KEYS:
        if is_within(key, [row.key]) and (value := value_at(old, row.key)) is not ABSENT:
            return f" (--set {shlex.quote(f'{row.key}={json.dumps(value)}')})"
    return ""
