"""Stop requests: every rank stops after the same step, with its state saved, and resumes as if nothing had been."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.configs import with_values
from tests.harness import run_ranks
from tests.stops import Signal, stop_and_resume

STEPS = 40

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data 2, ZeRO 1": (2, {"deepspeed__zero_optimization": {"stage": 1}, "checkpoint__asynchronous": True}),
    "tensor 2 x pipeline 2": (4, {"parallel__tensor": 2, "parallel__pipeline": 2}),
}
MORE_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data 2, ZeRO 0, accumulation": (2, {"deepspeed__train_batch_size": 16}),
    "data 2, ZeRO 3": (2, {"deepspeed__zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}),
    "tensor 2": (2, {"parallel__tensor": 2}),
    "pipeline 2": (2, {"parallel__pipeline": 2}),
    "data 2 x tensor 2, ZeRO 2": (4, {"parallel__tensor": 2, "deepspeed__zero_optimization": {"stage": 2}}),
}


@pytest.mark.parametrize("name", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.matrix) for name in MORE_LAYOUTS)])
def test_all_ranks_stop_after_the_same_step_and_resume_exactly(name: str, tiny: dict[str, Any], tmp_path: Path) -> None:
    world, values = (LAYOUTS | MORE_LAYOUTS)[name]
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
    signals = [Signal(rank, numbers[rank % 3], "training") for rank in range(world)]
    signals += [Signal(1, signal.SIGTERM, "save"), Signal(world - 1, signal.SIGTERM, "evaluation")]
    if name in LAYOUTS:
        signals = signals[-3:]
    config = with_values(tiny, training__max_steps=STEPS, training__log_every_steps=1, checkpoint__every_steps=10,
                         evaluation__every_steps=15, **values)  # fmt: skip
    asynchronous = values.get("checkpoint__asynchronous", False)
    results = run_ranks(stop_and_resume, world, config, signals, 1)
    unbroken = results[0][0]
    assert sorted(unbroken) == list(range(1, STEPS + 1))
    for number, sent in enumerate(signals):
        ranks = [stopped[number] for _, stopped in results]
        assert len({rank.step for rank in ranks}) == 1, [rank.step for rank in ranks]
        first, step = ranks[0], ranks[0].step
        assert 0 < step < STEPS
        if sent.during != "training":
            begun = {"save": 10, "evaluation": 15}[sent.during]
            assert step == begun + 1 or (sent.during == "save" and asynchronous and step > begun), (
                "one more step, no more"
            )
        assert first.saved[-1] == f"step-{step:08}"
        preempted = [event for event in first.events if event["event"] == "preempted"]
        cause = f"{sent.number.name} (rank {sent.rank})"
        assert [(event["step"], event["cause"]) for event in preempted] == [(step, cause)]
        assert "start the same command again" in first.message
        assert cause in first.message
        assert step not in first.evaluated, "an evaluation is not begun by a run that stops"
        assert [event["step"] for event in first.events if event["event"] == "save"].count(step) == 1
        assert first.losses == unbroken, "the resumed run computes what the unbroken one does"
