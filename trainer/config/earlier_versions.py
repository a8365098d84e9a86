"""Configurations stored by earlier versions, in the keys of this one.

A default that changes numerics must not change a run that has begun. A stored configuration (a run directory's
config.json, the `config` of a checkpoint's manifest) holds every key of the version that wrote it, so a key that it
lacks was added later, and means what that version did. `ADDED_KEYS` is the table of these meanings.

To add a key whose default changes what a run computes: one row in `ADDED_KEYS`. The row makes the key identify a run,
lets a resumed run keep the stored meaning, and upgrades what is read from disk.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.model_facts import causal_switch
from trainer.config.schema import SECTIONS
from trainer.errors import CheckpointError, Problem
from trainer.store import MANIFEST, read_manifest

ABSENT: Any = type("Absent", (), {"__repr__": lambda self: "ABSENT"})()
"""No value: the key does not stand in the configuration, or does not apply to it."""

Raw = dict[str, Any]


@dataclass(frozen=True)
class AddedKey:
    """A key that earlier versions did not have."""

    key: str
    """Dotted."""

    meaning: Any
    """The value with which a configuration that lacks the key ran; or a function of that configuration, which returns
    `ABSENT` where the key does not apply to it: then a key of the schema has its default, and one of `model.config`,
    whose keys are each family's own, is not set."""

    default: Any = ABSENT
    """What a new run uses, for keys that the schema does not list. Listed keys have the schema's default."""

    replaces: str = ""
    """The key, removed since, that said the same."""

    replacement: str = ""
    """What to write instead of `replaces`."""

    def meaning_in(self, stored: Mapping[str, Any]) -> Any:
        """The value for a stored configuration that lacks the key."""
        return self.meaning(stored) if callable(self.meaning) else copy.deepcopy(self.meaning)

    @property
    def listed_default(self) -> Any:
        """The schema's default; `ABSENT` if it does not list the key."""
        section, _, key = self.key.partition(".")
        field = SECTIONS[section].model_fields.get(key)
        return ABSENT if field is None else field.get_default(call_default_factory=True)

    @property
    def new_default(self) -> Any:
        """What a run that begins now uses where the key is not set."""
        return self.default if self.listed_default is ABSENT else self.listed_default


def _end_of_text(stored: Mapping[str, Any]) -> str:
    return "none" if value_at(stored, "data.append_end_of_text") is False else "end"


def _unexpected_keys(stored: Mapping[str, Any]) -> Any:
    return True if isinstance(value_at(stored, "model.path"), str) else ABSENT


def _bidirectional(switch: str) -> Callable[[Mapping[str, Any]], Any]:
    """Models with random weights were built without the switch that makes the attention of their family causal."""

    def meaning(stored: Mapping[str, Any]) -> Any:
        return False if causal_switch(value_at(stored, "model.config.model_type")) == switch else ABSENT

    return meaning


def _drop_last(stored: Mapping[str, Any]) -> bool:
    return value_at(stored, "data.packing") in (ABSENT, "concatenate")


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


def upgraded(stored: Mapping[str, Any]) -> Raw:
    """A stored configuration with today's keys: those added since have the meaning that it had without them."""
    config: Raw = copy.deepcopy(dict(stored))
    for row in ADDED_KEYS:
        if value_at(stored, row.key) is ABSENT:
            meaning = row.meaning_in(stored)
            meaning = row.listed_default if meaning is ABSENT else meaning
            if meaning is not ABSENT:
                _set(config, row.key, meaning)
        if row.replaces:
            _remove(config, row.replaces)
    return config


def replaced_key(key: str) -> Problem | None:
    """What to answer to a key of earlier versions that another one has replaced."""
    for row in ADDED_KEYS:
        if row.replaces == key:
            return Problem(key, f"replaced by '{row.key}'", row.replacement)
    return None


def stored_configuration(folder: Path) -> Raw | None:
    """The upgraded configuration of a run directory or a checkpoint.

    Args:
        folder: a checkpoint, a run directory, or the folder of its checkpoints.

    Returns:
        None if there is none that can be read: whoever needs it says what is wrong.
    """
    try:
        if (folder / MANIFEST).is_file():
            return upgraded(read_manifest(folder).config)
        if (folder / "config.json").is_file():
            stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            is_ours = isinstance(stored, dict) and all(isinstance(stored.get(name), dict) for name in ("run", "data"))
            return upgraded(stored) if is_ours else None
        manifests = sorted([*folder.glob(f"step-*/{MANIFEST}"), *folder.glob(f"checkpoints/step-*/{MANIFEST}")])
        return stored_configuration(manifests[-1].parent) if manifests else None
    except (OSError, ValueError, CheckpointError):
        return None


def _resumed_run(raw: Raw) -> tuple[Path, Raw] | None:
    """Where the configuration of the run stands that `raw` resumes, and that configuration upgraded."""
    resume, output = value_at(raw, "checkpoint.resume"), value_at(raw, "run.output_dir")
    resume = "auto" if resume is ABSENT else resume
    if resume == "never":
        return None
    for name in (output,) if resume == "auto" else (resume, output):
        if not isinstance(name, str) or not name or "://" in name:
            continue
        folder = Path(name).expanduser()
        if (stored := stored_configuration(folder)) is not None:
            return folder, stored
    return None


def keep_stored_meanings(raw: Raw) -> str:
    """Sets those added keys that `raw` leaves out to what the run that it resumes has there.

    Args:
        raw: a merged configuration that has not been checked; changed in place.

    Returns:
        One line about values that a new run would not have; empty if there are none.
    """
    found = _resumed_run(raw)
    if found is None:
        return ""
    folder, stored = found
    kept = []
    for row in ADDED_KEYS:
        meaning = value_at(stored, row.key)
        if meaning is ABSENT or row.meaning_in(raw) is ABSENT or value_at(raw, row.key) is not ABSENT:
            continue
        _set(raw, row.key, meaning)
        if meaning != row.new_default:
            new = "unset" if row.new_default is ABSENT else json.dumps(row.new_default)
            kept.append(f"{row.key} = {json.dumps(meaning)} (new runs: {new})")
    if not kept:
        return ""
    return f"resuming with the values that the run in {folder} began with: {', '.join(kept)}"
