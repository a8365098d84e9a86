"""Upgrading configurations that earlier versions stored.

A default that changes numerics must not change a run that has begun. A stored configuration (a run directory's
config.json, the `config` of a checkpoint's manifest) holds every key of the version that wrote it. A key that it lacks
was added later, and has the value that describes what the earlier version did. `ADDED_KEYS` lists these values.

To add a key whose default changes what a run computes, add a row to `ADDED_KEYS`. The row makes the key identify a run,
lets a resumed run keep the earlier value, and upgrades what is read from disk. To change the default of another key,
add a row to `CHANGED_DEFAULTS`.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from trainer.checkpoint_format import MANIFEST, read_manifest
from trainer.config.causal_attention import causal_switch
from trainer.config.schema import SECTIONS
from trainer.errors import CheckpointError, Problem
from trainer.json_types import Json


class Absent(enum.Enum):
    """Type of `ABSENT`."""

    ABSENT = "absent"


ABSENT: Final = Absent.ABSENT
"""No value: the key is not set, or does not apply to the configuration."""

Value: TypeAlias = "Json | Absent"

Raw = dict[str, Any]

METADATA_KEY = "tessera"
"""Key of a run's config.json for metadata of the run; ignored when the file is run again."""


def _schema_default(dotted: str) -> Value:
    """Return the schema's default of a key; `ABSENT` if the schema does not list it."""
    section, _, key = dotted.partition(".")
    field = SECTIONS[section].model_fields.get(key)
    return ABSENT if field is None else field.get_default(call_default_factory=True)


@dataclass(frozen=True)
class AddedKey:
    """A key that earlier versions do not have."""

    key: str
    """Dotted."""

    legacy_value: Value | Callable[[Mapping[str, Any]], Value]
    """The value that describes what a configuration without the key computed, or a function of that configuration. It
    returns `ABSENT` where the key does not apply: then a key of the schema has its default, and a key of `model.config`
    stays unset."""

    default: Value = ABSENT
    """Value in new runs of a key that the schema does not list. Other keys have the schema's default."""

    replaces: str = ""
    """The removed key that this one replaces."""

    replacement: str = ""
    """Replacement to suggest for `replaces`, for messages."""

    def legacy_value_in(self, stored: Mapping[str, Any]) -> Value:
        """Return the value for a stored configuration that lacks the key."""
        return self.legacy_value(stored) if callable(self.legacy_value) else copy.deepcopy(self.legacy_value)

    @property
    def schema_default(self) -> Value:
        """The schema's default; `ABSENT` if it does not list the key."""
        return _schema_default(self.key)

    @property
    def new_default(self) -> Value:
        """Value in new runs that do not set the key."""
        return self.default if self.schema_default is ABSENT else self.schema_default


def _end_of_text(stored: Mapping[str, Any]) -> str:
    return "none" if value_at(stored, "data.append_end_of_text") is False else "end"


def _unexpected_keys(stored: Mapping[str, Any]) -> Value:
    return True if isinstance(value_at(stored, "model.path"), str) else ABSENT


def _bidirectional(switch: str) -> Callable[[Mapping[str, Any]], Value]:
    """Return the legacy value of a family's switch for causal attention, which random weights were built without."""

    def legacy_value(stored: Mapping[str, Any]) -> Value:
        return False if causal_switch(value_at(stored, "model.config.model_type")) == switch else ABSENT

    return legacy_value


def _drop_last(stored: Mapping[str, Any]) -> Value:
    return True if value_at(stored, "data.packing") in (ABSENT, "concatenate") else ABSENT


ADDED_KEYS: tuple[AddedKey, ...] = (
    AddedKey(
        "data.special_tokens",
        _end_of_text,
        replaces="data.append_end_of_text",
        replacement='Set data.special_tokens: "end" stands for true, "none" for false',
    ),
    AddedKey("model.allow_unexpected_keys", _unexpected_keys),
    AddedKey("training.weight_decay_exclude", []),
    AddedKey("training.learning_rate_scales", {}),
    AddedKey("model.config.is_decoder", _bidirectional("is_decoder"), default=True),
    AddedKey("model.config.causal", _bidirectional("causal"), default=True),
    AddedKey("data.drop_last", _drop_last),
    AddedKey("run.plugins", []),
)


@dataclass(frozen=True)
class ChangedDefault:
    """A default that changed for new runs, of a key that does not identify a run.

    A run that has begun keeps the earlier default until the user sets the key.
    """

    key: str
    """Dotted."""

    before: Json
    """The earlier default, as stored configurations contain it."""

    since: str
    """A key that was added with the new default: a stored configuration without it is of an earlier version."""


CHANGED_DEFAULTS: tuple[ChangedDefault, ...] = (
    ChangedDefault("checkpoint.every_steps", None, since="training.epochs"),
    ChangedDefault("checkpoint.keep_last", None, since="training.epochs"),  # the new one would delete checkpoints
)


def value_at(config: Mapping[str, Any], key: str) -> Value:
    """Return the value at a dotted key; `ABSENT` if it is not set."""
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return ABSENT
        node = node[part]
    value: Value = node
    return value


def _set(config: Raw, key: str, value: object) -> None:
    *parents, last = key.split(".")
    node: Any = config
    for part in parents:
        node = node.setdefault(part, {}) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node[last] = value


def _remove(config: Raw, key: str) -> None:
    parent, _, last = key.rpartition(".")
    holder = value_at(config, parent)
    if isinstance(holder, dict):
        holder.pop(last, None)


def upgrade_config(stored: Mapping[str, Any]) -> Raw:
    """Return a stored configuration in the keys of this version; added keys have their legacy value."""
    config: Raw = copy.deepcopy(dict(stored))
    for added in ADDED_KEYS:
        if value_at(stored, added.key) is ABSENT:
            legacy_value = added.legacy_value_in(stored)
            legacy_value = added.schema_default if legacy_value is ABSENT else legacy_value
            if legacy_value is not ABSENT:
                _set(config, added.key, legacy_value)
        if added.replaces:
            _remove(config, added.replaces)
    return config


def replaced_key_problem(key: str) -> Problem | None:
    """Return the problem of a key of earlier versions that another key has replaced; None for any other key."""
    for added in ADDED_KEYS:
        if added.replaces == key:
            return Problem(key, f"replaced by '{added.key}'", added.replacement)
    return None


@dataclass(frozen=True)
class StoredRun:
    """The configuration and metadata of a run, from its run directory or a checkpoint."""

    folder: Path
    """The folder that was searched."""

    written: Raw
    """The configuration in the keys of the version that wrote it."""

    about: Mapping[str, Any]
    """Metadata: `METADATA_KEY` of a config.json, or `about` of a manifest."""

    @property
    def config(self) -> Raw:
        """The upgraded configuration."""
        return upgrade_config(self.written)

    def uses_legacy_default(self, key: str) -> bool:
        """Return whether an earlier version began the run without `key`, so that no user has set its value."""
        return value_at(self.written, key) is ABSENT or key in (self.about.get("kept_meanings") or ())


def stored_run(folder: Path) -> StoredRun | None:
    """Read the configuration and metadata of a run.

    Args:
        folder: A checkpoint, a run directory, or the folder of its checkpoints.

    Returns:
        None if no configuration can be read there; callers that need one report the cause.
    """
    if (folder / MANIFEST).is_file():
        return _run_of_checkpoint(folder)
    try:
        if (folder / "config.json").is_file():
            stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            is_run_config = isinstance(stored, dict) and all(
                isinstance(stored.get(name), dict) for name in ("run", "data")
            )
            if is_run_config:
                about = stored.get(METADATA_KEY)
                return StoredRun(folder, stored, about if isinstance(about, dict) else {})
    except (OSError, ValueError, RecursionError):
        pass  # a checkpoint's manifest holds the configuration too
    manifests = [*folder.glob(f"step-*/{MANIFEST}"), *folder.glob(f"checkpoints/step-*/{MANIFEST}")]
    runs = (_run_of_checkpoint(path.parent) for path in sorted(manifests, reverse=True))
    return next((run for run in runs if run is not None), None)


def _run_of_checkpoint(folder: Path) -> StoredRun | None:
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return None
    return StoredRun(folder, dict(manifest.config), manifest.about)


def _resumed_run(raw: Raw) -> StoredRun | None:
    """Return the run that `raw` resumes, if it is stored on this machine."""
    resume, output = value_at(raw, "checkpoint.resume"), value_at(raw, "run.output_dir")
    resume = "auto" if resume is ABSENT else resume
    if resume == "never":
        return None
    for name in (output,) if resume == "auto" else (resume, output):
        if not isinstance(name, str) or not name or "://" in name:
            continue
        with contextlib.suppress(OSError):  # an overlong name, which a rule reports
            if (run := stored_run(Path(name).expanduser())) is not None:
                return run
    return None


@dataclass(frozen=True)
class LegacyDefaults:
    """Defaults of an earlier version that a resumed run keeps."""

    keys: tuple[str, ...] = ()
    """Keys with the legacy value. Stored with the run, for its next attempt."""

    message: str = ""
    """One line about values that differ from those of a new run; empty if there are none."""


NO_LEGACY_DEFAULTS = LegacyDefaults()
"""For a new run, or one that this version began."""


def apply_legacy_defaults(raw: Raw) -> LegacyDefaults:
    """Set added keys that `raw` does not set to their legacy value in the run that it resumes.

    Applies only to keys that the earlier version did not have: values that this version stored are compared as usual.

    Args:
        raw: A merged configuration that is not checked yet; changed in place.
    """
    run = _resumed_run(raw)
    if run is None:
        return NO_LEGACY_DEFAULTS
    stored, keys, changes = run.config, [], []
    for added in ADDED_KEYS:
        legacy_value, current = value_at(stored, added.key), value_at(raw, added.key)
        applies = legacy_value is not ABSENT and added.legacy_value_in(raw) is not ABSENT
        if not applies or not run.uses_legacy_default(added.key) or current not in (ABSENT, legacy_value):
            continue
        keys.append(added.key)
        if current is not ABSENT:
            continue
        _set(raw, added.key, legacy_value)
        if legacy_value != added.new_default:
            new = "unset" if added.new_default is ABSENT else json.dumps(added.new_default)
            changes.append(f"{added.key} = {json.dumps(legacy_value)} (new runs: {new})")
    for change in CHANGED_DEFAULTS:
        is_kept = value_at(run.written, change.since) is ABSENT or change.key in (run.about.get("kept_meanings") or ())
        current = value_at(raw, change.key)
        if not is_kept or value_at(stored, change.key) != change.before or current not in (ABSENT, change.before):
            continue
        keys.append(change.key)
        if current is ABSENT:
            _set(raw, change.key, change.before)
            new = json.dumps(_schema_default(change.key))
            changes.append(f"{change.key} = {json.dumps(change.before)} (new runs: {new})")
    message = f"resuming with the values that the run in {run.folder} began with: {', '.join(changes)}"
    return LegacyDefaults(tuple(keys), message if changes else "")
