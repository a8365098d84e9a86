"""Configurations stored by earlier versions, in the keys of this one.

A default that changes numerics must not change a run that has begun. A stored configuration (a run directory's
config.json, the `config` of a checkpoint's manifest) holds every key of the version that wrote it, so a key that it
lacks was added later, and means what that version did. `ADDED_KEYS` is the table of these meanings.

To add a key whose default changes what a run computes: one row in `ADDED_KEYS`. The row makes the key identify a run,
lets a resumed run keep the stored meaning, and upgrades what is read from disk. To change a default of another key:
one row in `CHANGED_DEFAULTS`.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint_format import MANIFEST, read_manifest
from trainer.config.causal_attention import causal_switch
from trainer.config.schema import SECTIONS
from trainer.errors import CheckpointError, Problem

ABSENT: Any = type("Absent", (), {"__repr__": lambda self: "ABSENT"})()
"""No value: the key does not stand in the configuration, or does not apply to it."""

Raw = dict[str, Any]

METADATA_KEY = "tessera"
"""What a run directory's config.json says about the run itself stands under it; ignored when it is run again."""


def _schema_default(dotted: str) -> Any:
    """The schema's default of a key; `ABSENT` if the schema does not list it."""
    section, _, key = dotted.partition(".")
    field = SECTIONS[section].model_fields.get(key)
    return ABSENT if field is None else field.get_default(call_default_factory=True)


@dataclass(frozen=True)
class AddedKey:
    """A key that earlier versions did not have."""

    key: str
    """Dotted."""

    legacy_value: Any
    """The value with which a configuration that lacks the key ran; or a function of that configuration, which returns
    `ABSENT` where the key does not apply to it: then a key of the schema has its default, and one of `model.config`,
    whose keys are each family's own, is not set."""

    default: Any = ABSENT
    """What a new run uses, for keys that the schema does not list. Listed keys have the schema's default."""

    replaces: str = ""
    """The key, removed since, that said the same."""

    replacement: str = ""
    """What to write instead of `replaces`."""

    def legacy_value_in(self, stored: Mapping[str, Any]) -> Any:
        """The value for a stored configuration that lacks the key."""
        return self.legacy_value(stored) if callable(self.legacy_value) else copy.deepcopy(self.legacy_value)

    @property
    def schema_default(self) -> Any:
        """The schema's default; `ABSENT` if it does not list the key."""
        return _schema_default(self.key)

    @property
    def new_default(self) -> Any:
        """What a run that begins now uses where the key is not set."""
        return self.default if self.schema_default is ABSENT else self.schema_default


def _end_of_text(stored: Mapping[str, Any]) -> str:
    return "none" if value_at(stored, "data.append_end_of_text") is False else "end"


def _unexpected_keys(stored: Mapping[str, Any]) -> Any:
    return True if isinstance(value_at(stored, "model.path"), str) else ABSENT


def _bidirectional(switch: str) -> Callable[[Mapping[str, Any]], Any]:
    """Models with random weights were built without the switch that makes the attention of their family causal."""

    def legacy_value(stored: Mapping[str, Any]) -> Any:
        return False if causal_switch(value_at(stored, "model.config.model_type")) == switch else ABSENT

    return legacy_value


def _drop_last(stored: Mapping[str, Any]) -> Any:
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
    """A default that changed for new runs. It does not identify a run; a begun run keeps the earlier default until the
    user sets the key."""

    key: str
    """Dotted."""

    before: Any
    """The earlier default, as stored configurations contain it."""

    since: str
    """A key that was added by the version with the new default: a stored configuration without it is an earlier one."""


CHANGED_DEFAULTS: tuple[ChangedDefault, ...] = (
    ChangedDefault("checkpoint.every_steps", None, since="training.epochs"),
    ChangedDefault("checkpoint.keep_last", None, since="training.epochs"),  # the new one would delete checkpoints
)


def value_at(config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key; `ABSENT` if it is not set."""
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return ABSENT
        node = node[part]
    return node


def _set(config: Raw, key: str, value: Any) -> None:
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
    """A stored configuration with today's keys: those added since have the meaning that it had without them."""
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
    """What to answer to a key of earlier versions that another one has replaced."""
    for added in ADDED_KEYS:
        if added.replaces == key:
            return Problem(key, f"replaced by '{added.key}'", added.replacement)
    return None


@dataclass(frozen=True)
class StoredRun:
    """What a run directory or a checkpoint stores about its run."""

    folder: Path
    """The folder that was searched."""

    written: Raw
    """The configuration in the keys of the version that wrote it."""

    about: Mapping[str, Any]
    """Metadata: `METADATA_KEY` of a config.json, `about` of a manifest."""

    @property
    def config(self) -> Raw:
        """The upgraded configuration."""
        return upgrade_config(self.written)

    def uses_legacy_default(self, key: str) -> bool:
        """Whether an earlier version began the run without `key`, so that no user has chosen its value."""
        return value_at(self.written, key) is ABSENT or key in (self.about.get("kept_meanings") or ())


def stored_run(folder: Path) -> StoredRun | None:
    """What `folder` stores about its run.

    Args:
        folder: a checkpoint, a run directory, or the folder of its checkpoints.

    Returns:
        None if no configuration can be read there: whoever needs it says what is wrong.
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
    """The run that `raw` resumes, as far as this machine's folders tell."""
    resume, output = value_at(raw, "checkpoint.resume"), value_at(raw, "run.output_dir")
    resume = "auto" if resume is ABSENT else resume
    if resume == "never":
        return None
    for name in (output,) if resume == "auto" else (resume, output):
        if not isinstance(name, str) or not name or "://" in name:
            continue
        with contextlib.suppress(OSError):  # an overlong name, which rules tell
            if (run := stored_run(Path(name).expanduser())) is not None:
                return run
    return None


@dataclass(frozen=True)
class LegacyDefaults:
    """What a resumed run keeps of an earlier version."""

    keys: tuple[str, ...] = ()
    """Added keys with the value that the run had before they existed. Stored with the run, for its next attempt."""

    message: str = ""
    """One line about values that a new run would not have; empty if there are none."""


NO_LEGACY_DEFAULTS = LegacyDefaults()
"""Of a run that begins now, or that this version began."""


def apply_legacy_defaults(raw: Raw) -> LegacyDefaults:
    """Sets those added keys that `raw` leaves out to their meaning in the run that it resumes.

    Only keys that an earlier version did not know: a value that this version stored is compared like any other.

    Args:
        raw: a merged configuration that has not been checked; changed in place.
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
