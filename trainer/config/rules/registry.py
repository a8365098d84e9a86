"""The table of rules, and the draft of a configuration that they examine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from trainer.config.deepspeed import DeepSpeedSection, min_data_ranks
from trainer.config.model_facts import ModelFacts
from trainer.config.schema import (
    CheckpointSection,
    DataSection,
    EvaluationSection,
    ModelSection,
    ParallelSection,
    RunSection,
    TrackingSection,
    TrainingSection,
)
from trainer.errors import Problem

Device = Literal["cpu", "cuda"]


@dataclass
class Draft:
    """A configuration under examination: a section is None where it cannot be built."""

    run: RunSection | None = None
    model: ModelSection | None = None
    data: DataSection | None = None
    training: TrainingSection | None = None
    deepspeed: DeepSpeedSection | None = None
    parallel: ParallelSection | None = None
    evaluation: EvaluationSection | None = None
    checkpoint: CheckpointSection | None = None
    tracking: TrackingSection | None = None
    facts: ModelFacts | None = None
    derived_steps: int | None = None
    """Optimizer steps of `training.epochs`; None while they have not been counted."""

    world_size: int | None = None
    """Number of processes; None when it is open (a dry run)."""

    device: Device | None = None
    """Where the run will compute; None when that is not known here (a dry run)."""

    @property
    def steps(self) -> int | None:
        """Optimizer steps in all; None while those of `training.epochs` have not been counted."""
        assert self.training is not None
        return self.derived_steps if self.training.max_steps is None else self.training.max_steps

    @property
    def steps_in_words(self) -> str:
        """What says the number of steps, and the number."""
        assert self.training is not None
        if self.training.max_steps is not None:
            return f"training.max_steps ({self.training.max_steps})"
        return f"the {self.steps} steps of training.epochs ({self.training.epochs:g})"

    @property
    def data_ranks(self) -> int | None:
        """Ranks of the data axis; None when the world cannot be divided that way."""
        assert self.parallel is not None
        assert self.deepspeed is not None
        replica = self.parallel.tensor * self.parallel.pipeline
        if self.world_size is None:
            return min_data_ranks(self.deepspeed)
        return self.world_size // replica if self.world_size % replica == 0 else None


@dataclass(frozen=True)
class Rule:
    """One relation between keys that must hold."""

    name: str
    needs: tuple[str, ...]
    """Dotted prefixes of what the rule reads; it is skipped where one of them is wrong in itself."""

    check: Callable[[Draft], Iterator[Problem]]


RULES: list[Rule] = []


def rule(*needs: str) -> Callable[[Callable[[Draft], Iterator[Problem]]], Callable[[Draft], Iterator[Problem]]]:
    """Adds a check to the table, under its function's name."""

    def add(check: Callable[[Draft], Iterator[Problem]]) -> Callable[[Draft], Iterator[Problem]]:
        RULES.append(Rule(check.__name__, needs, check))
        return check

    return add
