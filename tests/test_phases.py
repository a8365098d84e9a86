"""Phases of a run: the timeout of collectives in each, and the marks that ranks compare."""

from __future__ import annotations

import pytest

from trainer.distributed.phases import COMPILE_SECONDS, DEFAULT_SECONDS, JOIN_TIMEOUT, Phase, Phases

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("phase", ["start", "data", "join", "build", "resume", "finished"])
def test_timeout_outside_training_is_that_of_joining(phase: Phase) -> None:
    phases = Phases(20.0)
    phases.enter("save")
    phases.enter(phase)
    assert phases.timeout == JOIN_TIMEOUT.total_seconds()


@pytest.mark.parametrize("phase", ["step", "evaluate"])
@pytest.mark.parametrize("configured", [20.0, 2 * COMPILE_SECONDS])
def test_first_step_and_evaluation_have_time_to_compile(phase: Phase, configured: float) -> None:
    phases = Phases(configured)
    timeouts = []
    for step in (1, 2, 3):
        phases.enter(phase, step)
        timeouts.append(phases.timeout)
    assert timeouts == [max(configured, COMPILE_SECONDS), configured, configured]


@pytest.mark.parametrize("phase", ["save", "final"])
def test_saving_has_the_configured_timeout_at_once(phase: Phase) -> None:
    phases = Phases(20.0)
    phases.enter(phase)
    assert phases.timeout == 20.0


def test_default_timeout_is_half_an_hour() -> None:
    phases = Phases()
    phases.enter("save")
    assert phases.timeout == DEFAULT_SECONDS == 1800.0


def test_marks_count_phases_and_work() -> None:
    phases = Phases()
    phases.enter("step", 7)
    phases.advance()
    phases.advance()
    assert (phases.mark.phase_index, phases.mark.progress, phases.mark.name) == (1, 2, "step 7")
    phases.enter("save", 7)
    assert (phases.mark.phase_index, phases.mark.progress, phases.mark.name) == (2, 0, "checkpoint of step 7")
