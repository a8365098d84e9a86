"""The injection of sections into rules."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from trainer.config.model_facts import ModelFacts
from trainer.config.rules import RULES, Draft, Processes, Rule, TrainingLength, registry
from trainer.config.schema import ParallelSection, TrainingSection
from trainer.errors import Problem

pytestmark = pytest.mark.fast
PARALLEL = ParallelSection(tensor=4)
FACTS = ModelFacts("llama", vocabulary_size=320, hidden_size=32, max_positions=64, attention_heads=6)


def registered(check: registry.Check, *keys: str) -> Rule:
    """Register a check, and remove it from the rules."""
    registry.rule_reading(*keys)(check)
    return RULES.pop()


def divisible(parallel: ParallelSection, facts: ModelFacts, processes: Processes) -> Iterator[Problem]:
    yield Problem("parallel.tensor", f"{facts.attention_heads} / {parallel.tensor} on {processes.world_size}")


def test_rule_receives_what_its_annotations_name() -> None:
    draft = Draft(Processes(8), {"parallel": PARALLEL}, FACTS)
    assert registered(divisible).problems(draft) == [Problem("parallel.tensor", "6 / 4 on 8")]


def test_rule_is_skipped_without_section_or_facts() -> None:
    assert registered(divisible).problems(Draft(Processes(8), {}, FACTS)) == []
    assert registered(divisible).problems(Draft(Processes(8), {"parallel": PARALLEL})) == []


@pytest.mark.parametrize(
    ("invalid", "keys", "applies"),
    [
        ("parallel.pipeline", (), False),
        ("model.config", (), False),
        ("data.train", (), True),
        ("parallel.pipeline", ("parallel.tensor",), True),
        ("parallel.tensor", ("parallel.tensor",), False),
        ("parallel", ("parallel.tensor",), False),
        ("model.path", ("parallel.tensor",), False),
        ("parallel.tensor_plan.x", ("parallel.tensor",), True),
    ],
)
def test_rule_is_skipped_if_a_key_it_reads_is_invalid(invalid: str, keys: tuple[str, ...], applies: bool) -> None:
    draft = Draft(Processes(8), {"parallel": PARALLEL}, FACTS, invalid={invalid})
    assert bool(registered(divisible, *keys).problems(draft)) == applies


def test_rule_with_unknown_parameter_type_cannot_be_registered() -> None:
    def check(world_size: int) -> Iterator[Problem]:
        yield Problem("", str(world_size))

    with pytest.raises(KeyError):
        registered(check)


@pytest.mark.parametrize(
    ("training", "derived", "length"),
    [
        (TrainingSection(max_steps=4), None, TrainingLength(4, "training.max_steps (4)")),
        (TrainingSection(epochs=1.5), 37, TrainingLength(37, "the 37 steps of training.epochs (1.5)")),
        (TrainingSection(epochs=1.5), None, TrainingLength(None, "the None steps of training.epochs (1.5)")),
    ],
)
def test_training_length_follows_steps_or_counted_epochs(
    training: TrainingSection, derived: int | None, length: TrainingLength
) -> None:
    assert TrainingLength.of(training, derived) == length


def test_every_rule_reads_a_key() -> None:
    assert all(rule.keys for rule in RULES)
