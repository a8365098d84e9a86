"""One file, the same numbers from every layout: losses, gradient norms, every gradient, every weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.configs import tiny_config, with_values
from tests.harness import run_ranks
from tests.training_jobs import Curve, Weights, train, train_bare

STEPS = 20
BATCH = 8


@dataclass(frozen=True)
class Layout:
    """One way of running the same global batch."""

    world: int
    stage: int
    accumulation: int
    packing: str = "none"
    offload: bool = False
    checkpointing: str = "none"
    tensor: int = 1
    sequence_parallel: bool = False
    pipeline: int = 1

    def __str__(self) -> str:
        extra = "-offload" * self.offload + f"-{self.checkpointing}" * (self.checkpointing != "none")
        extra += f"-pipeline{self.pipeline}" * (self.pipeline > 1)
        extra += f"-tensor{self.tensor}" * (self.tensor > 1) + "-sequence" * self.sequence_parallel
        return f"world{self.world}-zero{self.stage}-accumulate{self.accumulation}-{self.packing}{extra}"


LAYOUTS = [
    Layout(1, 0, 1),
    Layout(1, 0, 4),
    Layout(2, 0, 2),
    Layout(1, 1, 2),
    Layout(2, 1, 4),
    Layout(2, 2, 4),
    Layout(2, 3, 1),
    Layout(2, 3, 2, offload=True),
    Layout(2, 3, 1, checkpointing="selective"),
    Layout(1, 0, 2, "concatenate"),
    Layout(2, 0, 1, tensor=2),
    Layout(2, 1, 2, tensor=2),
    Layout(2, 3, 1, "concatenate", tensor=2),
    Layout(4, 1, 2, tensor=2, offload=True),
    Layout(4, 0, 1, tensor=4),  # its two key/value heads are each held by two ranks
    Layout(2, 0, 2, tensor=2, sequence_parallel=True),
    Layout(2, 0, 4, pipeline=2),
    Layout(2, 1, 4, "concatenate", pipeline=2),
    Layout(4, 0, 2, "concatenate", pipeline=2),
    Layout(4, 0, 2, pipeline=2, tensor=2),
    Layout(8, 0, 2, "concatenate", pipeline=2, tensor=2, sequence_parallel=True),
]

MATRIX_LAYOUTS = [
    Layout(4, 1, 2, pipeline=2, tensor=2, sequence_parallel=True, checkpointing="selective"),
    Layout(4, 3, 2),
    Layout(4, 3, 1, "concatenate"),
    Layout(4, 3, 2, tensor=2),
    Layout(4, 1, 2, tensor=4),
    Layout(4, 3, 1, tensor=4),
    Layout(4, 1, 4, pipeline=2, tensor=2, sequence_parallel=True),
    Layout(8, 1, 2, pipeline=2, tensor=2),
    Layout(4, 2, 2),
    Layout(4, 1, 2),
    Layout(2, 3, 2, checkpointing="full"),
    Layout(4, 0, 2, tensor=2),
    Layout(4, 1, 2, tensor=2, sequence_parallel=True, checkpointing="full"),
    Layout(4, 0, 1),
    Layout(2, 1, 1),
    Layout(2, 2, 1),
    Layout(2, 3, 4),
    Layout(2, 1, 2, offload=True),
    Layout(2, 2, 2, offload=True),
    Layout(2, 0, 2, checkpointing="full"),
    Layout(2, 1, 2, "concatenate"),
    Layout(4, 1, 1, tensor=2, checkpointing="full"),
    Layout(4, 2, 2, tensor=2),
    Layout(4, 3, 1, tensor=2, offload=True, checkpointing="full"),
    Layout(4, 3, 1, "concatenate", tensor=4, sequence_parallel=True),
    Layout(2, 0, 1, pipeline=2),
    Layout(4, 1, 2, pipeline=2, checkpointing="full"),
]
"""In `make matrix`: each of their parts is in some of the others."""


def config_of(layout: Layout, base: dict[str, Any], **values: Any) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": layout.stage, "stage3_param_persistence_threshold": 0}
    if layout.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return with_values(
        base,
        data__packing=layout.packing,
        model__activation_checkpointing=layout.checkpointing,
        parallel__tensor=layout.tensor,
        parallel__pipeline=layout.pipeline,
        parallel__sequence_parallel=layout.sequence_parallel,
        deepspeed__train_batch_size=BATCH,
        deepspeed__train_micro_batch_size_per_gpu=None,
        deepspeed__gradient_accumulation_steps=layout.accumulation,
        deepspeed__zero_optimization=zero,
        **values,
    )


@pytest.fixture(scope="module")
def base(corpus: Path, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_config(corpus, shared_cache, tmp_path_factory.mktemp("runs"))


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
    """By way of packing."""
    found = {}
    for packing in ("none", "concatenate"):
        adamw, sgd = run_ranks(train_bare, 1, jobs_of(Layout(1, 0, 1, packing), base))[0]
        found[packing] = Reference(adamw[0], adamw[1], sgd[1])
    return found


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
    reference = references[layout.packing]
    ranks = run_ranks(train, layout.world, jobs_of(layout, base))
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
        run_ranks(train, lay.world, [(config_of(lay, base), 0)])[0][0][2]
        for lay in (
            Layout(1, 0, 1),
            Layout(4, 3, 1),
            Layout(4, 0, 2, pipeline=2),
        )
    ]
    assert found == pytest.approx([found[0]] * len(found), rel=1e-6)


@pytest.mark.parametrize("fault", ["mean of means", "drop a micro-batch", "no clipping"])
def test_layout_comparison_detects_sabotage(fault: str, base: dict[str, Any], references: dict[str, Any]) -> None:
    """The negative controls: each break makes the comparison above fail."""
    layout = Layout(2, 0, 2)
    curve = run_ranks(train, 2, [(config_of(layout, base), STEPS)], fault)[0][0][0]
    loss, _ = differences(curve, references[layout.packing].curve)
    assert loss > 1e-4
