"""From files and overrides to a checked `Config`: every mistake is found in one pass."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from trainer.compat import check_names
from trainer.compat.deepspeed.names import CONFIGURATION, DEEPSPEED
from trainer.config import rules as cross_section
from trainer.config.deepspeed import (
    Batch,
    batch_arithmetic,
    fp32_fallback_warnings,
    missing_values,
    normalize_section,
    resolve,
)
from trainer.config.earlier_versions import (
    NO_LEGACY_DEFAULTS,
    LegacyDefaults,
    apply_legacy_defaults,
)
from trainer.config.model_facts import (
    ModelFacts,
    default_attention,
    model_config,
    model_facts,
    with_causal_attention,
)
from trainer.config.plugins import import_plugins
from trainer.config.read import apply_override, named_deepspeed_file, read_config_file
from trainer.config.rules import Device, Draft, configuration_warnings
from trainer.config.schema import SECTIONS, Config
from trainer.config.validate import unknown_sections, validate_section
from trainer.errors import ConfigError, Problem
from trainer.sanitize import redact_json

Raw = dict[str, Any]


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration that passed every rule, with what was derived from it."""

    config: Config
    facts: ModelFacts
    batch: Batch
    world_size: int
    deepspeed_json: Raw
    """What DeepSpeed receives: resolved, plain JSON."""

    derived_steps: int | None = None
    """Optimizer steps of `training.epochs`; None while they have not been counted (`with_steps`)."""

    warnings: tuple[Problem, ...] = ()
    legacy_defaults: LegacyDefaults = NO_LEGACY_DEFAULTS
    """What a resumed run keeps of the earlier version that began it."""

    @property
    def data_ranks(self) -> int:
        return self.world_size // (self.config.parallel.tensor * self.config.parallel.pipeline)

    @property
    def known_steps(self) -> int | None:
        """Optimizer steps in all; None while those of `training.epochs` have not been counted."""
        return self.derived_steps if self.config.training.max_steps is None else self.config.training.max_steps

    @property
    def steps(self) -> int:
        """Optimizer steps in all.

        Raises:
            RuntimeError: those of `training.epochs` have not been counted yet.
        """
        if self.known_steps is None:
            raise RuntimeError("the steps of training.epochs are known once the data are prepared")
        return self.known_steps

    @property
    def length_unit(self) -> Literal["max_steps", "epochs"]:
        """The key of `training` that says how long the run is."""
        return "max_steps" if self.config.training.epochs is None else "epochs"

    def resolved(self) -> Raw:
        """The whole configuration as plain JSON, defaults and the resolved `deepspeed` section included.

        Secrets in URLs are redacted, because it is what is stored and logged: `config` has them.
        """
        whole = self.config.model_dump(mode="json", exclude={"deepspeed"})
        whole["run"]["name"] = self.name
        whole["model"]["initialize"] = self.initialize
        whole["model"]["attention"] = self.attention
        resolved: Raw = redact_json({**whole, "deepspeed": self.deepspeed_json})
        return resolved

    @cached_property
    def attention(self) -> str:
        section = self.config.model
        return section.attention or default_attention(model_config(section), section.task)

    @property
    def name(self) -> str:
        return self.config.run.name or Path(self.config.run.output_dir).expanduser().resolve().name

    @property
    def initialize(self) -> str:
        return self.config.model.initialize or ("pretrained" if self.config.model.path else "random")


def _skipped(needs: Iterable[str], invalid: set[str]) -> bool:
    def touches(a: str, b: str) -> bool:
        return a == b or a.startswith(b + ".") or b.startswith(a + ".")

    return any(touches(need, path) for need in needs for path in invalid)


def _inspect_model(draft: Draft) -> list[Problem]:
    section = draft.model
    if section is None or (section.path is None) == (section.config is None):
        return []
    try:
        draft.model = section = with_causal_attention(section)
        draft.facts = model_facts(model_config(section))
    except ConfigError as error:
        return error.problems
    return []


def _checked(rule: cross_section.Rule, draft: Draft) -> list[Problem]:
    """The problems of a rule; a path that the file system refuses to look at, such as an overlong one, is one too."""
    try:
        return list(rule.check(draft))
    except OSError as error:
        return [Problem(rule.needs[0], f"a path cannot be examined: {error}")]


def check_config(
    raw: Raw, *, world_size: int | None, device: Device | None, deepspeed_file: str | None = None
) -> LoadedConfig:
    """Builds and checks a merged configuration.

    Args:
        raw: the merged JSON. world_size: the number of processes, None when open. device: see `Draft.device`.
        deepspeed_file: the DeepSpeed file that was merged in, by the name to show.

    Raises:
        ConfigError: with every problem there is.
    """
    raw = json.loads(json.dumps(raw))
    problems = unknown_sections(raw)
    draft = Draft(world_size=world_size, device=device)
    invalid: set[str] = set()
    given: Any = raw.get("deepspeed")
    if isinstance(given, dict):
        raw["deepspeed"] = normalize_section(given, device)
    for name, field in Config.model_fields.items():
        if name not in raw:
            if field.is_required():
                problems.append(Problem(name, "required, but missing"))
                invalid.add(name)
                continue
            raw[name] = {}
        found = validate_section(name, raw[name], draft)
        problems += found.problems
        if name == "deepspeed" and isinstance(given, dict):
            problems += missing_values(raw[name], found.unresolved_autos, deepspeed_file)
        invalid |= found.invalid
        if getattr(draft, name) is None:
            invalid.add(name)
    if draft.run is not None and (unusable := list(import_plugins(draft.run.plugins))):
        problems += unusable
        invalid.add("model")  # whose class may be theirs
    if not _skipped(("model",), invalid):
        problems += _inspect_model(draft)
    for rule in cross_section.RULES:
        if not _skipped(rule.needs, invalid):
            problems += _checked(rule, draft)
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    loaded = _finish(draft)
    return replace(loaded, warnings=(*fp32_fallback_warnings(given, raw["deepspeed"]), *loaded.warnings))


def _finish(draft: Draft) -> LoadedConfig:
    config = Config.model_construct(**{name: getattr(draft, name) for name in SECTIONS})
    assert draft.facts is not None
    data_ranks = draft.data_ranks
    assert data_ranks is not None
    batch = batch_arithmetic(config.deepspeed, data_ranks)
    assert isinstance(batch, Batch)
    return LoadedConfig(
        config=config,
        facts=draft.facts,
        batch=batch,
        world_size=data_ranks * config.parallel.tensor * config.parallel.pipeline,
        deepspeed_json=resolve(
            config.deepspeed,
            data_ranks=data_ranks,
            steps=draft.steps,
            hidden_size=draft.facts.hidden_size,
        ),
        derived_steps=draft.derived_steps,
        warnings=tuple(configuration_warnings(draft)),
    )


def with_steps(loaded: LoadedConfig, steps: int) -> LoadedConfig:
    """`loaded`, whose steps `training.epochs` gives, resolved with their number.

    Raises:
        ConfigError: with the problems of all rules that read the number of steps.
    """
    sections = {name: getattr(loaded.config, name) for name in SECTIONS}
    draft = Draft(**sections, facts=loaded.facts, world_size=loaded.world_size, derived_steps=steps)
    rules = [rule for rule in cross_section.RULES if "training.max_steps" in rule.needs]
    if problems := [problem for rule in rules for problem in rule.check(draft)]:
        raise ConfigError(problems)
    return replace(_finish(draft), legacy_defaults=loaded.legacy_defaults)


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, world_size: int | None = None, device: Device | None = None
) -> LoadedConfig:
    """Reads, merges, overrides, checks and resolves the configuration at `path`.

    Where it resumes a run, keys added since that run began keep the meaning they had (`earlier_versions.py`).

    Raises:
        ConfigError: with every problem that was found.
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
    return replace(
        check_config(raw, world_size=world_size, device=device, deepspeed_file=deepspeed_file),
        legacy_defaults=legacy_defaults,
    )
