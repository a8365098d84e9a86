"""Experts whose widths do not suit the grouped matrix product, which needs multiples of 16 bytes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.configs import tiny_config, with_values
from tests.harness import run_ranks
from tests.meta_models import meta_model
from tests.test_families import describe
from tests.test_model import MIXTRAL
from tests.training_jobs import train, train_bare
from tools.parity.families import Family
from tools.parity.gradient_proof import prove
from trainer.errors import PlanError
from trainer.tensor_parallel import TensorMapper, choose_experts_implementation, model_region, resolve_plan

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.fast
@pytest.mark.parametrize(
    ("hidden", "width", "ranks", "dtype", "implementation"),
    [
        (64, 32, 1, FP32, "grouped_mm"),
        (64, 36, 1, FP32, "grouped_mm"),
        (64, 36, 1, BF16, "eager"),
        (64, 34, 1, FP32, "eager"),
        (72, 40, 2, FP32, "grouped_mm"),
        (72, 40, 2, BF16, "eager"),
        (64, 12, 2, FP32, "eager"),
        (68, 32, 1, BF16, "eager"),
    ],
)
def test_experts_implementation_suits_their_widths(
    hidden: int, width: int, ranks: int, dtype: torch.dtype, implementation: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = meta_model("mixtral", hidden_size=hidden, intermediate_size=width, head_dim=8)
    with caplog.at_level(logging.INFO, "trainer"):
        if ranks > 1:
            TensorMapper(
                model,
                resolve_plan(model, {}, ranks, 0),
                model_region(model, None, ranks, 0),
                lambda count: None,
                dtype=dtype,
            )
        else:
            choose_experts_implementation(model, dtype)
    assert model.model.layers[0].mlp.experts.config._experts_implementation == implementation
    assert "_experts_implementation" not in model.config.to_json_string()
    lines = [line for line in caplog.messages if line.startswith("computing experts one at a time")]
    assert len(lines) == (implementation == "eager")


@pytest.mark.fast
def test_unsupported_expert_widths_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = meta_model("mixtral", intermediate_size=34)
    monkeypatch.setattr(type(model), "set_experts_implementation", lambda self, name: None)
    with pytest.raises(PlanError, match=r"width of 34 on a rank, 136 bytes in float32.*a multiple of 4"):
        choose_experts_implementation(model, FP32)


def test_experts_of_any_width_gradients_match() -> None:
    """The full width, 12, is a multiple of 16 bytes; the width on a rank, 6, is not."""
    families = [
        Family("mixtral", variant="narrow", fields={"intermediate_size": 12}),
        Family("qwen3_moe", variant="narrow", fields={"moe_intermediate_size": 12}),
        Family("gpt_oss", variant="narrow", fields={"intermediate_size": 12}),
        Family("nemotron_h", variant="narrow", fields={"moe_intermediate_size": 12}),
    ]
    verdicts = run_ranks(prove, 2, families)[0]
    assert [describe(v) for v in verdicts if v.outcome != "right"] == []


def test_run_trains_experts_of_any_width(corpus: Path, shared_cache: Path, tmp_path: Path) -> None:
    """Compare with a bare process: a width that suits no rank (18), and widths that do not suit two ranks."""
    base = with_values(tiny_config(corpus, shared_cache, tmp_path), data__validation=[])

    def config(width: int, **values: Any) -> dict[str, Any]:
        return with_values(
            base, model={"config": {**MIXTRAL, "intermediate_size": width, "router_aux_loss_coef": 0.0}}, **values
        )

    zero3 = {"stage": 3, "stage3_param_persistence_threshold": 0}
    expected = run_ranks(train_bare, 1, [(config(width), 1) for width in (18, 12, 24)])[0]
    alone = run_ranks(train, 1, [(config(18), 1)])[0]
    parted = [config(12, parallel__tensor=2, deepspeed__zero_optimization=zero) for zero in ({"stage": 0}, zero3)]
    half = config(24, parallel__tensor=2, deepspeed__bf16={"enabled": True}, deepspeed__zero_optimization={"stage": 1})
    *exact, rounded = run_ranks(train, 2, [(job, 1) for job in (*parted, half)])[0]
    for verdicts, reference in zip([*alone, *exact], [expected[n] for n in (0, 1, 1)], strict=True):
        np.testing.assert_allclose(verdicts[0], reference[0], rtol=2e-5)
        for name in reference[1]:
            np.testing.assert_allclose(verdicts[1][name], reference[1][name], atol=2e-5, rtol=0, err_msg=name)
    np.testing.assert_allclose(rounded[0], expected[2][0], rtol=2e-2)
