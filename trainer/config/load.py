"""Load files and overrides as a checked `Config`. All problems are reported in one pass."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from trainer.compat import check_names
from trainer.compat.deepspeed.names import CONFIGURATION, DEEPSPEED
from trainer.config.causal_attention import with_causal_attention
from trainer.config.deepspeed import (
    Batch,
    batch_arithmetic,
    fp32_fallback_warnings,
    missing_values,
    normalize_section,
    resolve,
)
from trainer.config.earlier_versions import NO_LEGACY_DEFAULTS, LegacyDefaults, apply_legacy_defaults
from trainer.config.model_config import model_config
from trainer.config.model_facts import ModelFacts, default_attention, model_facts
from trainer.config.plugins import import_plugins
from trainer.config.read import apply_override, named_deepspeed_file, read_config_file
from trainer.config.rules import RULES, WARNINGS, Device, Draft, Processes, Rule, TrainingLength
from trainer.config.schema import SECTIONS, Config, ModelSection, RunSection
from trainer.config.validate import unknown_sections, validate_section
from trainer.errors import ConfigError, Problem
from trainer.sanitize import redact_json

Raw = dict[str, Any]


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration that passed every rule, with what is derived from it."""

    config: Config
    """The sections, as the user set them, with defaults. Contains secrets of URLs."""

    facts: ModelFacts
    """Numbers of the model's configuration."""

    batch: Batch
    """Sizes of the global batch and the micro-batches."""

    world_size: int
    """Number of processes; the smallest possible one if it is open (a dry run)."""

    deepspeed_json: Raw
    """The `deepspeed` section that DeepSpeed receives: resolved, as plain JSON."""

    derived_steps: int | None = None
    """Optimizer steps of `training.epochs`; None while they are not counted (`with_steps`)."""

    warnings: tuple[Problem, ...] = ()
    """Valid values that are probably not intended."""

    legacy_defaults: LegacyDefaults = NO_LEGACY_DEFAULTS
    """Defaults of the earlier version that began the run, which a resumed run keeps."""

    @property
    def data_ranks(self) -> int:
        """Size of the data axis."""
        return self.world_size // self.config.parallel.model_parallel_size

    @property
    def known_steps(self) -> int | None:
        """Optimizer steps of the run; None while those of `training.epochs` are not counted."""
        return self.derived_steps if self.config.training.max_steps is None else self.config.training.max_steps

    @property
    def steps(self) -> int:
        """Optimizer steps of the run.

        Raises:
            RuntimeError: Those of `training.epochs` are not counted yet.
        """
        if self.known_steps is None:
            raise RuntimeError("the steps of training.epochs are known once the data are prepared")
        return self.known_steps

    @property
    def length_unit(self) -> Literal["max_steps", "epochs"]:
        """The key of `training` that sets the length of the run."""
        return "max_steps" if self.config.training.epochs is None else "epochs"

    def resolved(self) -> Raw:
        """Return the whole configuration as plain JSON, with defaults and the resolved `deepspeed` section.

        It is stored and logged, so secrets of URLs are redacted.
        """
        sections = self.config.model_dump(mode="json", exclude={"deepspeed"})
        sections["run"]["name"] = self.name
        sections["model"]["initialize"] = self.initialize
        sections["model"]["attention"] = self.attention
        resolved: Raw = redact_json({**sections, "deepspeed": self.deepspeed_json})
        return resolved

    @cached_property
    def attention(self) -> str:
        """Attention implementation of transformers, by default the family's."""
        section = self.config.model
        return section.attention or default_attention(model_config(section), section.task)

    @property
    def name(self) -> str:
        """Name of the run for trackers."""
        return self.config.run.name or Path(self.config.run.output_dir).expanduser().resolve().name

    @property
    def initialize(self) -> str:
        """Where the weights come from: `pretrained` or `random`."""
        return self.config.model.initialize or ("pretrained" if self.config.model.path else "random")


def _inspect_model(draft: Draft) -> list[Problem]:
    """Set the facts of a draft's model, and its causal attention; return the problems."""
    section = draft.sections.get("model")
    if not isinstance(section, ModelSection) or (section.path is None) == (section.config is None):
        return []
    try:
        draft.sections["model"] = section = with_causal_attention(section)
        draft.facts = model_facts(model_config(section))
    except ConfigError as error:
        return error.problems
    return []


def _problems(draft: Draft, rules: Iterable[Rule]) -> list[Problem]:
    """Return the problems of all rules. A path that cannot be examined, such as an overlong one, is a problem too."""
    problems: list[Problem] = []
    for rule in rules:
        try:
            problems += rule.problems(draft)
        except OSError as error:
            problems.append(Problem(rule.keys[0], f"a path cannot be examined: {error}"))
    return problems


def _build_sections(draft: Draft, raw: Raw, deepspeed_file: str | None) -> list[Problem]:
    """Add the sections of `raw` to the draft, and absent ones with their defaults; return the problems."""
    problems: list[Problem] = []
    for name, field in Config.model_fields.items():
        if name not in raw and field.is_required():
            problems.append(Problem(name, "required, but missing"))
            draft.invalid.add(name)
            continue
        result = validate_section(name, raw.setdefault(name, {}))
        problems += result.problems
        if name == "deepspeed" and isinstance(raw[name], dict):
            problems += missing_values(raw[name], result.unresolved_autos, deepspeed_file)
        draft.invalid |= result.invalid
        if result.section is None:
            draft.invalid.add(name)
        else:
            draft.sections[name] = result.section
    return problems


def check_config(
    raw: Raw, *, world_size: int | None, device: Device | None, deepspeed_file: str | None = None
) -> LoadedConfig:
    """Build and check a merged configuration.

    Args:
        raw: The merged JSON.
        world_size: Number of processes; None if it is open.
        device: Device that the run computes on; None if it is unknown.
        deepspeed_file: Name of the DeepSpeed file that was merged in, for messages.

    Raises:
        ConfigError: With all problems.
    """
    raw = json.loads(json.dumps(raw))
    draft = Draft(Processes(world_size, device))
    problems = unknown_sections(raw)
    deepspeed: Any = raw.get("deepspeed")
    if isinstance(deepspeed, dict):
        raw["deepspeed"] = normalize_section(deepspeed, device)
    problems += _build_sections(draft, raw, deepspeed_file)
    run = draft.sections.get("run")
    if isinstance(run, RunSection) and (plugin_problems := list(import_plugins(run.plugins))):
        problems += plugin_problems
        draft.invalid.add("model")  # its class may be registered by a plugin
    if draft.is_valid("model"):
        problems += _inspect_model(draft)
    problems += _problems(draft, RULES)
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    loaded = _finish(draft)
    return replace(loaded, warnings=(*fp32_fallback_warnings(deepspeed, raw["deepspeed"]), *loaded.warnings))


def _finish(draft: Draft) -> LoadedConfig:
    """Return the configuration of a draft without problems."""
    sections: dict[str, Any] = {name: draft.sections[name] for name in SECTIONS}
    config = Config.model_construct(**sections)
    facts, data_ranks = draft.facts, draft.processes.data_ranks(config.parallel, config.deepspeed)
    batch = None if data_ranks is None else batch_arithmetic(config.deepspeed, data_ranks)
    if facts is None or data_ranks is None or not isinstance(batch, Batch):
        raise RuntimeError("a configuration without problems has a model and a batch")
    steps = TrainingLength.of(config.training, draft.derived_steps).steps
    return LoadedConfig(
        config=config,
        facts=facts,
        batch=batch,
        world_size=data_ranks * config.parallel.model_parallel_size,
        deepspeed_json=resolve(config.deepspeed, data_ranks=data_ranks, steps=steps, hidden_size=facts.hidden_size),
        derived_steps=draft.derived_steps,
        warnings=tuple(_problems(draft, WARNINGS)),
    )


def with_steps(loaded: LoadedConfig, steps: int) -> LoadedConfig:
    """Return the configuration resolved with the counted steps of `training.epochs`.

    Raises:
        ConfigError: With the problems of all rules that read the number of steps.
    """
    draft = Draft.of(loaded.config, loaded.facts, Processes(loaded.world_size), derived_steps=steps)
    length_rules = [rule for rule in RULES if TrainingLength in rule.parameters.values()]
    if problems := _problems(draft, length_rules):
        raise ConfigError(problems)
    return replace(_finish(draft), legacy_defaults=loaded.legacy_defaults)


def device_problems(loaded: LoadedConfig, device: Device) -> list[Problem]:
    """Return why a configuration that was checked without a device cannot run on this one."""
    draft = Draft.of(loaded.config, loaded.facts, Processes(loaded.world_size, device))
    return _problems(draft, [rule for rule in RULES if rule.name == "device_supported"])


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, world_size: int | None = None, device: Device | None = None
) -> LoadedConfig:
    """Read, merge, override, check and resolve a configuration file.

    Where it resumes a run, keys that were added since that run began keep the meaning they had
    (`earlier_versions.py`).

    Args:
        path: The file.
        overrides: Assignments `a.b=value`.
        world_size: Number of processes; None if it is open.
        device: Device that the run computes on; None if it is unknown.

    Raises:
        ConfigError: With all problems.
        IncompatibleDependencyError: The installed DeepSpeed lacks an internal name that reading its section needs.
    """
    check_names(DEEPSPEED, CONFIGURATION)
    raw, deepspeed_file = read_config_file(Path(path)), named_deepspeed_file(Path(path))
    problems = []
    for assignment in overrides:
        try:
            apply_override(raw, assignment)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    if any(assignment.partition("=")[0].strip() == "deepspeed" for assignment in overrides):
        deepspeed_file = None
    legacy_defaults = apply_legacy_defaults(raw)
    loaded = check_config(raw, world_size=world_size, device=device, deepspeed_file=deepspeed_file)
    return replace(loaded, legacy_defaults=legacy_defaults)
