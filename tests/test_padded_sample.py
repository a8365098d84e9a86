"""The padded last sample of a source: losses and weights of each layout equal those of a plain process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.configs import LENGTH, tiny_config, with_values
from tests.harness import run_ranks
from tests.training_jobs import Outcome, train, train_bare
from trainer.data.indexed import IndexedWriter

STEPS = 3
BATCH = 8

LAYOUTS = {
    "dualpipev": {"parallel__pipeline": 2, "parallel__pipeline_schedule": "dualpipev"},
    "pipeline and sequence": {"parallel__pipeline": 2, "parallel__tensor": 2, "parallel__sequence_parallel": True},
    "ZeRO 3": {"deepspeed__zero_optimization": {"stage": 3}},
}


@pytest.fixture(scope="module")
def base(corpus: Path, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Configure two sources of 5 and 2 samples, whose last ones have 6 and 1 targets; every step reads both."""
    folder = tmp_path_factory.mktemp("sources")
    draw = np.random.default_rng(5)
    for name, count in (("a", 4 * LENGTH + 7), ("b", LENGTH + 2)):
        with IndexedWriter(folder / name, np.uint16) as writer:
            writer.add(draw.integers(0, 320, count).tolist())
    return with_values(
        tiny_config(corpus, shared_cache, tmp_path_factory.mktemp("runs")),
        data__train=[{"path": str(folder / f"{name}.bin")} for name in ("a", "b")],
        data__validation=[],
        deepspeed__train_batch_size=BATCH,
        model__config__num_hidden_layers=4,
        deepspeed__optimizer={"type": "SGD", "params": {"lr": 0.3}},
    )


@pytest.fixture(scope="module")
def reference(base: dict[str, Any]) -> Outcome:
    return run_ranks(train_bare, 1, [(base, STEPS)])[0][0]


def world_of(values: dict[str, Any]) -> int:
    return max(2, values.get("parallel__pipeline", 1) * values.get("parallel__tensor", 1))


def max_differences(outcome: Outcome, expected: Outcome) -> tuple[float, float]:
    """Return the largest relative difference of a loss, and the largest difference of a weight."""
    losses = np.array(outcome[0])[:, 0] / np.array(expected[0])[:, 0] - 1
    weights = [np.abs(outcome[1][name] - weight).max() for name, weight in expected[1].items()]
    return float(np.abs(losses).max()), float(max(weights))


@pytest.mark.parametrize(
    "name", ["dualpipev", "pipeline and sequence", pytest.param("ZeRO 3", marks=pytest.mark.matrix)]
)
def test_short_last_sample_trains_equally_in_every_layout(name: str, base: dict[str, Any], reference: Outcome) -> None:
    values = LAYOUTS[name]
    ((outcome,), *_) = run_ranks(train, world_of(values), [(with_values(base, **values), STEPS)])
    loss, weight = max_differences(outcome, reference)
    assert loss < 1e-5
    assert weight < 5e-7, "with SGD the update of a weight is proportional to its gradient"


def test_dropped_last_sample_changes_training(base: dict[str, Any], reference: Outcome) -> None:
    """Negative control of the comparison above."""
    outcome = run_ranks(train_bare, 1, [(with_values(base, data__drop_last=True), STEPS)])[0][0]
    assert max_differences(outcome, reference)[0] > 1e-4
