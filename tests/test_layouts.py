"""One file, the same numbers from every layout: losses, gradient norms, every gradient, every weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests.configs import with_values
from tests.harness import run_ranks
from tests.training_jobs import Curve, Weights, train, train_bare
from tools.parity.layout import Changes, Layout

STEPS = 20
BATCH = 8


OFFLOAD: Changes = (("deepspeed.zero_optimization.offload_optimizer", {"device": "cpu"}),)
PACKED: Changes = (("data.packing", "concatenate"),)
SELECTIVE: Changes = (("model.activation_checkpointing", "selective"),)
FULL: Changes = (("model.activation_checkpointing", "full"),)


def layout_of(world_size: int, zero: int, accumulation: int, *changes: Changes, **axes: Any) -> Layout:
    return Layout(world_size, zero=zero, accumulation=accumulation, changes=sum(changes, ()), **axes)


LAYOUTS = [
    layout_of(1, 0, 1),
    layout_of(1, 0, 4),
    layout_of(2, 0, 2),
    layout_of(1, 1, 2),
    layout_of(2, 1, 4),
    layout_of(2, 2, 4),
    layout_of(2, 3, 1),
    layout_of(2, 3, 2, OFFLOAD),
    layout_of(2, 3, 1, SELECTIVE),
    layout_of(1, 0, 2, PACKED),
    layout_of(2, 0, 1, tensor=2),
    layout_of(2, 1, 2, tensor=2),
    layout_of(2, 3, 1, PACKED, tensor=2),
    layout_of(4, 1, 2, OFFLOAD, tensor=2),
    layout_of(4, 0, 1, tensor=4),  # its two key/value heads are each held by two ranks
    layout_of(2, 0, 2, tensor=2, sequence_parallel=True),
    layout_of(2, 0, 4, pipeline=2),
    layout_of(2, 1, 4, PACKED, pipeline=2),
    layout_of(4, 0, 2, PACKED, pipeline=2),
    layout_of(4, 0, 2, pipeline=2, tensor=2),
    layout_of(8, 0, 2, PACKED, pipeline=2, tensor=2, sequence_parallel=True),
]

MATRIX_LAYOUTS = [
    layout_of(4, 1, 2, SELECTIVE, pipeline=2, tensor=2, sequence_parallel=True),
    layout_of(4, 3, 2),
    layout_of(4, 3, 1, PACKED),
    layout_of(4, 3, 2, tensor=2),
    layout_of(4, 1, 2, tensor=4),
    layout_of(4, 3, 1, tensor=4),
    layout_of(4, 1, 4, pipeline=2, tensor=2, sequence_parallel=True),
    layout_of(8, 1, 2, pipeline=2, tensor=2),
    layout_of(4, 2, 2),
    layout_of(4, 1, 2),
    layout_of(2, 3, 2, FULL),
    layout_of(4, 0, 2, tensor=2),
    layout_of(4, 1, 2, FULL, tensor=2, sequence_parallel=True),
    layout_of(4, 0, 1),
    layout_of(2, 1, 1),
    layout_of(2, 2, 1),
    layout_of(2, 3, 4),
    layout_of(2, 1, 2, OFFLOAD),
    layout_of(2, 2, 2, OFFLOAD),
    layout_of(2, 0, 2, FULL),
    layout_of(2, 1, 2, PACKED),
    layout_of(4, 1, 1, FULL, tensor=2),
    layout_of(4, 2, 2, tensor=2),
    layout_of(4, 3, 1, OFFLOAD, FULL, tensor=2),
    layout_of(4, 3, 1, PACKED, tensor=4, sequence_parallel=True),
    layout_of(2, 0, 1, pipeline=2),
    layout_of(4, 1, 2, FULL, pipeline=2),
]
"""In `make matrix`: each of their parts is in some of the others."""


def config_of(layout: Layout, base: dict[str, Any], **values: Any) -> dict[str, Any]:
    config = with_values(
        base,
        data__packing="none",
        deepspeed__train_batch_size=BATCH,
        deepspeed__train_micro_batch_size_per_gpu=None,
        deepspeed__gradient_accumulation_steps=layout.accumulation,
        deepspeed__zero_optimization={"stage3_param_persistence_threshold": 0},
        **values,
    )
    return layout.apply_to(config)


SGD = {"type": "SGD", "params": {"lr": 1.0}}
"""With SGD at rate 1 and one step, the change of a weight is its (clipped) gradient."""


@dataclass(frozen=True)
class Reference:
    """What one process without any engine computes."""

    curve: Curve
    weights: Weights
    weights_after_one_sgd_step: Weights


@pytest.fixture(scope="module")
def references(base: dict[str, Any]) -> dict[str, Reference]:
    """By value of `data.packing`."""
    by_packing = {}
    for packing in ("none", "concatenate"):
        adamw, sgd = run_ranks(train_bare, 1, jobs_of(layout_of(1, 0, 1, (("data.packing", packing),)), base))[0]
        by_packing[packing] = Reference(adamw[0], adamw[1], sgd[1])
    return by_packing


def jobs_of(layout: Layout, base: dict[str, Any]) -> list[tuple[dict[str, Any], int]]:
    return [(config_of(layout, base), STEPS), (config_of(layout, base, deepspeed__optimizer=SGD), 1)]


def differences(got: Curve, expected: Curve) -> tuple[float, float]:
    """Largest relative difference of the losses, and of the gradient norms."""
    a, b = np.array(got), np.array(expected)
    assert a.shape == b.shape
    worst = np.abs(a - b) / np.abs(b)
    return float(worst[:, 0].max()), float(worst[:, 1].max())


@pytest.mark.parametrize(
    "layout", [*LAYOUTS, *(pytest.param(layout, marks=pytest.mark.matrix) for layout in MATRIX_LAYOUTS)], ids=str
)
def test_layout_equals_reference(layout: Layout, base: dict[str, Any], references: dict[str, Reference]) -> None:
    """20 losses and norms, the weights after them, and every gradient."""
    reference = references[dict(layout.changes).get("data.packing", "none")]
    ranks = run_ranks(train, layout.world_size, jobs_of(layout, base))
    (curve, weights, _), (_, weights_after_one_sgd_step, _) = ranks[0]
    loss, norm = differences(curve, reference.curve)
    assert loss < 1e-5
    assert norm < 2e-5
    assert all(rank[0][0] == curve for rank in ranks)
    for got, expected, tolerance in (
        (weights, reference.weights, 2e-5),
        (weights_after_one_sgd_step, reference.weights_after_one_sgd_step, 5e-7),
    ):
        assert got.keys() == expected.keys()
        for name in expected:
            np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=tolerance, err_msg=name)


def test_held_out_loss_is_equal_in_every_layout(base: dict[str, Any]) -> None:
    """45 documents in micro-batches of 1 to 8 on 1 and 4 ranks: the last batch is partial, ranks run dry."""
    found = [
        run_ranks(train, lay.world_size, [(config_of(lay, base), 0)])[0][0][2]
        for lay in (
            layout_of(1, 0, 1),
            layout_of(4, 3, 1),
            layout_of(4, 0, 2, pipeline=2),
        )
    ]
    assert found == pytest.approx([found[0]] * len(found), rel=1e-6)


@pytest.mark.parametrize("fault", ["mean of means", "drop a micro-batch", "no clipping"])
def test_layout_comparison_detects_sabotage(fault: str, base: dict[str, Any], references: dict[str, Any]) -> None:
    """The negative controls: each break makes the comparison above fail."""
    layout = layout_of(2, 0, 2)
    curve = run_ranks(train, 2, [(config_of(layout, base), STEPS)], fault)[0][0][0]
    loss, _ = differences(curve, references[dict(layout.changes).get("data.packing", "none")].curve)
    assert loss > 1e-4
