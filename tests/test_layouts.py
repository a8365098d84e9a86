"""One file, the same numbers from every layout: losses, gradient norms, every gradient, every weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.configs import tiny_config, with_values
from tests.harness import run_ranks
from tests.runs import Curve, Weights, train, train_bare

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

    def __str__(self) -> str:
        extra = "-offload" * self.offload + "-recompute" * (self.checkpointing == "full")
        return f"world{self.world}-zero{self.stage}-accumulate{self.accumulation}-{self.packing}{extra}"


LAYOUTS = [
    Layout(1, 0, 1),
    Layout(1, 0, 4),
    Layout(2, 0, 2),
    Layout(4, 0, 1),
    Layout(1, 1, 2),
    Layout(2, 1, 1),
    Layout(2, 1, 4),
    Layout(4, 1, 2),
    Layout(2, 2, 1),
    Layout(2, 2, 4),
    Layout(4, 2, 2),
    Layout(2, 3, 1),
    Layout(2, 3, 4),
    Layout(4, 3, 2),
    Layout(2, 1, 2, offload=True),
    Layout(2, 2, 2, offload=True),
    Layout(2, 3, 2, offload=True),
    Layout(2, 0, 2, checkpointing="full"),
    Layout(2, 3, 2, checkpointing="full"),
    Layout(1, 0, 2, "concatenate"),
    Layout(2, 1, 2, "concatenate"),
    Layout(4, 3, 1, "concatenate"),
]


def config_of(layout: Layout, base: dict[str, Any], **values: Any) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": layout.stage, "stage3_param_persistence_threshold": 0}
    if layout.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return with_values(
        base,
        data__packing=layout.packing,
        model__activation_checkpointing=layout.checkpointing,
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


@pytest.fixture(scope="module")
def references(base: dict[str, Any]) -> dict[str, tuple[Curve, Weights]]:
    """By way of packing: 20 steps of AdamW, and with key "gradients-..." one step of SGD."""
    found = {}
    for packing in ("none", "concatenate"):
        config = config_of(Layout(1, 0, 1, packing), base)
        found[packing] = run_ranks(train_bare, 1, config, STEPS)[0][:2]
        config = config_of(Layout(1, 0, 1, packing), base, deepspeed__optimizer=SGD)
        found[f"gradients-{packing}"] = run_ranks(train_bare, 1, config, 1)[0][:2]
    return found


def differences(got: Curve, expected: Curve) -> tuple[float, float]:
    """Largest relative difference of the losses, and of the gradient norms."""
    a, b = np.array(got), np.array(expected)
    assert a.shape == b.shape
    worst = np.abs(a - b) / np.abs(b)
    return float(worst[:, 0].max()), float(worst[:, 1].max())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_same_losses_and_norms(layout: Layout, base: dict[str, Any], references: dict[str, Any]) -> None:
    ranks = run_ranks(train, layout.world, config_of(layout, base), STEPS)
    loss, norm = differences(ranks[0][0], references[layout.packing][0])
    assert loss < 1e-5
    assert norm < 1e-4
    assert all(rank[0] == ranks[0][0] for rank in ranks)
    for name, weight in ranks[0][1].items():
        np.testing.assert_allclose(weight, references[layout.packing][1][name], rtol=0, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("layout", [lay for lay in LAYOUTS if lay.world > 1], ids=str)
def test_every_gradient_equals_one_process(layout: Layout, base: dict[str, Any], references: dict[str, Any]) -> None:
    config = config_of(layout, base, deepspeed__optimizer=SGD)
    weights = run_ranks(train, layout.world, config, 1)[0][1]
    expected = references[f"gradients-{layout.packing}"][1]
    assert weights.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(weights[name], expected[name], rtol=0, atol=1e-6, err_msg=name)


def test_held_out_loss_is_the_same(base: dict[str, Any]) -> None:
    """45 documents in micro-batches of 1 to 8 on 1, 2 and 4 ranks: the last batch is partial, ranks run dry."""
    found = [
        run_ranks(train, lay.world, config_of(lay, base), 0)[0][2]
        for lay in (Layout(1, 0, 1), Layout(2, 1, 2), Layout(4, 3, 1), Layout(1, 0, 8))
    ]
    assert found == pytest.approx([found[0]] * len(found), rel=1e-6)


@pytest.mark.parametrize("how", ["mean of means", "drop a micro-batch", "no clipping"])
def test_sabotage_is_noticed(how: str, base: dict[str, Any], references: dict[str, Any]) -> None:
    """The negative controls: each break makes the comparison above fail."""
    layout = Layout(2, 0, 2)
    curve = run_ranks(train, 2, config_of(layout, base), STEPS, how)[0][0]
    loss, _ = differences(curve, references[layout.packing][0])
    assert loss > 1e-4
