"""Muon under ZeRO: the gradient norm is that of the gradients, and clipping acts on them, before its update."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.configs import with_values
from tests.harness import run_ranks
from tests.training_jobs import train, train_bare

MUON = {"type": "Muon", "params": {"lr": 0.02, "adam_lr": 0.01, "momentum": 0.9, "weight_decay": 0.0, "eps": 1e-3}}
STEPS = 3
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
AT_3 = {"stage": 3, "reduce_scatter": False}
LAYOUTS: list[dict[str, Any]] = [{"stage": 1}, AT_3, {"stage": 2} | OFFLOAD]
MATRIX_LAYOUTS: list[dict[str, Any]] = [{"stage": 0}, {"stage": 2}, {"stage": 1} | OFFLOAD, AT_3 | OFFLOAD]


@pytest.fixture(scope="module")
def base(base: dict[str, Any]) -> dict[str, Any]:
    """Gradients are clipped in every step, by a factor that differs between steps."""
    return with_values(base, data__validation=[], data__packing="none", deepspeed__gradient_clipping=0.2)


@pytest.mark.parametrize(
    "layouts", [LAYOUTS, pytest.param(MATRIX_LAYOUTS, marks=pytest.mark.matrix)], ids=["few", "more"]
)
def test_muon_clips_gradients_before_update(
    layouts: list[dict[str, Any]], base: dict[str, Any], subtests: pytest.Subtests
) -> None:
    """Compare norms, losses and weights with Muon in a plain loop; the norm of step 1 is that of AdamW."""
    muon = with_values(base, deepspeed__optimizer=MUON)
    (expected,) = run_ranks(train_bare, 1, [(muon, STEPS)])[0]
    jobs = [(with_values(muon, deepspeed__zero_optimization=zero), STEPS) for zero in layouts]
    jobs += [(with_values(base, deepspeed__zero_optimization={"stage": 1}), 1)]
    *outcomes, adam = run_ranks(train, 2, jobs)[0]
    for zero, (curve, weights, _) in zip(layouts, outcomes, strict=True):
        with subtests.test(zero=zero):
            assert curve[0][1] == pytest.approx(adam[0][0][1], rel=1e-5)
            np.testing.assert_allclose(curve, expected[0], rtol=2e-4)
            for name, weight in expected[1].items():
                limit = 2e-4 * np.abs(weight).max()
                np.testing.assert_allclose(weights[name], weight, atol=limit, rtol=0, err_msg=name)


@pytest.mark.matrix
@pytest.mark.parametrize("stage", [0, 1])
def test_muon_clips_gradients_across_stages(stage: int, base: dict[str, Any]) -> None:
    muon = with_values(base, deepspeed__optimizer=MUON)
    (expected,) = run_ranks(train_bare, 1, [(muon, STEPS)])[0]
    cut = with_values(muon, parallel__pipeline=2, deepspeed__zero_optimization={"stage": stage})
    curve, weights, _ = run_ranks(train, 4, [(cut, STEPS)])[0][0]
    np.testing.assert_allclose(curve, expected[0], rtol=2e-4)
    for name, weight in expected[1].items():
        np.testing.assert_allclose(weights[name], weight, atol=2e-4 * np.abs(weight).max(), rtol=0, err_msg=name)


@pytest.mark.matrix
def test_muon_clips_gradients_in_bf16(base: dict[str, Any]) -> None:
    muon = with_values(base, deepspeed__optimizer=MUON)
    (expected,) = run_ranks(train_bare, 1, [(muon, STEPS)])[0]
    half = with_values(muon, deepspeed__bf16={"enabled": True})
    layouts = [*LAYOUTS, *MATRIX_LAYOUTS]
    jobs = [(with_values(half, deepspeed__zero_optimization=zero), STEPS) for zero in layouts]
    for zero, (curve, _, _) in zip(layouts, run_ranks(train, 2, jobs)[0], strict=True):
        np.testing.assert_allclose(np.array(curve)[:, 0], np.array(expected[0])[:, 0], rtol=0.01, err_msg=str(zero))
        np.testing.assert_allclose(np.array(curve)[:, 1], np.array(expected[0])[:, 1], rtol=0.1, err_msg=str(zero))
