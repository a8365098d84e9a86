"""The registries of rules and warnings, and the injection of what they read.

A rule is a plain function. The annotations of its parameters say what it reads: sections of the configuration,
`ModelFacts`, `Processes` or `TrainingLength`. It is skipped where one of them is missing or invalid, so that an invalid
value is reported once and not by all that depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_type_hints

from trainer.config.deepspeed import DeepSpeedSection, min_data_ranks
from trainer.config.model_facts import ModelFacts
from trainer.config.schema import SECTIONS, Config, ParallelSection, TrainingSection
from trainer.config.section import Section
from trainer.errors import Problem

Device = Literal["cpu", "cuda"]

Check = Callable[..., Iterator[Problem]]


@dataclass(frozen=True)
class Processes:
    """The processes that execute the run, if they are known."""

    world_size: int | None = None
    """Number of processes; None where it is open (a dry run)."""

    device: Device | None = None
    """Device that the run computes on; None where it is unknown (a dry run)."""

    def data_ranks(self, parallel: ParallelSection, deepspeed: DeepSpeedSection) -> int | None:
        """Return the size of the data axis; None if the model-parallel size does not divide the world size.

        Where the world size is open, it is the smallest size that the batch keys allow.
        """
        if self.world_size is None:
            return min_data_ranks(deepspeed)
        data_ranks, remainder = divmod(self.world_size, parallel.model_parallel_size)
        return None if remainder else data_ranks


@dataclass(frozen=True)
class TrainingLength:
    """The number of optimizer steps, and the key that determines it."""

    steps: int | None
    """Optimizer steps of the run; None while those of `training.epochs` are not counted."""

    description: str
    """The key with the number, for messages."""

    @classmethod
    def of(cls, training: TrainingSection, derived_steps: int | None) -> TrainingLength:
        """Return the length from `training.max_steps`, or from the counted steps of `training.epochs`."""
        if training.max_steps is not None:
            return cls(training.max_steps, f"training.max_steps ({training.max_steps})")
        epochs = "" if training.epochs is None else f" ({training.epochs:g})"
        return cls(derived_steps, f"the {derived_steps} steps of training.epochs{epochs}")


@dataclass
class Draft:
    """A configuration that is being checked. Sections that cannot be built are absent."""

    processes: Processes = field(default_factory=Processes)
    sections: dict[str, Section] = field(default_factory=dict)
    facts: ModelFacts | None = None
    """Facts of the model; None where its configuration cannot be read."""

    derived_steps: int | None = None
    """Optimizer steps of `training.epochs`; None while they are not counted."""

    invalid: set[str] = field(default_factory=set)
    """Dotted paths whose value is invalid or missing."""

    @classmethod
    def of(cls, config: Config, facts: ModelFacts, processes: Processes, *, derived_steps: int | None = None) -> Draft:
        """Return the draft of a valid configuration, to check it again under other circumstances."""
        return cls(processes, {name: getattr(config, name) for name in SECTIONS}, facts, derived_steps)

    def is_valid(self, key: str) -> bool:
        """Return whether no invalid path lies at, above or below a dotted key."""
        return not any(_is_same_or_below(key, path) or _is_same_or_below(path, key) for path in self.invalid)

    def _value_of(self, parameter_type: type) -> object | None:
        """Return what a parameter of this type receives; None if it is missing."""
        if parameter_type is Processes:
            return self.processes
        if parameter_type is ModelFacts:
            return self.facts
        if parameter_type is TrainingLength:
            training = self.sections.get("training")
            return TrainingLength.of(training, self.derived_steps) if isinstance(training, TrainingSection) else None
        return self.sections.get(_SECTION_NAMES[parameter_type])

    def arguments(self, parameters: Mapping[str, type]) -> dict[str, object] | None:
        """Return the arguments of a rule or warning by name; None if one is missing."""
        values = {name: self._value_of(parameter_type) for name, parameter_type in parameters.items()}
        return None if None in values.values() else {name: value for name, value in values.items() if value is not None}


def _is_same_or_below(key: str, other: str) -> bool:
    return key == other or key.startswith(f"{other}.")


_SECTION_NAMES: Mapping[type, str] = {section_class: name for name, section_class in SECTIONS.items()}

_KEYS_OF_TYPE: Mapping[type, tuple[str, ...]] = {
    Processes: (),
    ModelFacts: ("model",),
    TrainingLength: ("training.max_steps", "training.epochs"),
    **{section_class: (name,) for section_class, name in _SECTION_NAMES.items()},
}
"""Keys that a parameter of a type depends on."""


@dataclass(frozen=True)
class Rule:
    """A relation between keys that must hold, or that a warning reports."""

    name: str
    parameters: Mapping[str, type]
    keys: tuple[str, ...]
    """Dotted prefixes of the keys that the rule reads; it is skipped where one of them is invalid."""

    check: Check

    def problems(self, draft: Draft) -> list[Problem]:
        """Return the problems of a draft; none where a parameter is missing or depends on an invalid key."""
        if not all(map(draft.is_valid, self.keys)):
            return []
        arguments = draft.arguments(self.parameters)
        return [] if arguments is None else list(self.check(**arguments))


RULES: list[Rule] = []
"""Rules whose problems refuse a configuration."""

WARNINGS: list[Rule] = []
"""Rules whose problems are reported without refusing the configuration."""


def _registered(check: Check, registry: list[Rule], narrowed: tuple[str, ...]) -> Check:
    parameters = {name: annotation for name, annotation in get_type_hints(check).items() if name != "return"}
    keys = [key for parameter_type in parameters.values() for key in _KEYS_OF_TYPE[parameter_type]]
    keys = [key for key in keys if not any(_is_same_or_below(prefix, key) for prefix in narrowed)]
    registry.append(Rule(check.__name__, parameters, (*narrowed, *keys), check))
    return check


def rule(check: Check) -> Check:
    """Register a rule that reads the whole of each section among its parameters."""
    return _registered(check, RULES, ())


def rule_reading(*keys: str) -> Callable[[Check], Check]:
    """Register a rule that reads only these keys of their sections, so that it applies where others are invalid.

    Args:
        keys: Dotted prefixes. Sections without one are read as a whole.
    """
    return lambda check: _registered(check, RULES, keys)


def warning(check: Check) -> Check:
    """Register a warning. Its parameters are injected as those of a rule."""
    return _registered(check, WARNINGS, ())
