"""The engine beyond the layouts: optimizers, schedulers, precision, what it sends and what it waits for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.configs import tiny_config, with_values
from tests.harness import run_ranks
from tests.reference_optimizers import scheduled_learning_rates
from tests.test_model import GPT2, MIXTRAL
from tests.training_jobs import (
    auxiliary_loss,
    count_events,
    learning_rates,
    train,
    train_bare,
)

STEPS = 4


@pytest.fixture(scope="module")
def base(corpus: Path, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    config = tiny_config(corpus, shared_cache, tmp_path_factory.mktemp("runs"))
    return with_values(config, data__validation=[], data__packing="none")


def optimizer(optimizer_config: str, **params: Any) -> dict[str, Any]:
    return {"type": optimizer_config, "params": params}


EXACT = [
    optimizer("Adam", lr=0.002, eps=1e-3, adam_w_mode=False),
    optimizer("AdamW", lr=0.002, eps=1e-3, weight_decay=0.1),
    optimizer("AdamW", lr=0.002, eps=1e-3, weight_decay=0.1, torch_adam=True),
    optimizer("SGD", lr=0.05, momentum=0.9),
    optimizer("Adagrad", lr=0.005, eps=1e-3),
    optimizer("RMSprop", lr=0.0005, eps=1e-3),
    optimizer("NAdam", lr=0.002, eps=1e-3),
    optimizer("RAdam", lr=0.002, eps=1e-3),
    optimizer("Adamax", lr=0.002, eps=1e-3),
    optimizer("Adadelta", lr=0.05, eps=1e-3),
    optimizer("ASGD", lr=0.01),
]
"""Compared with the same optimizer of torch in one bare process, at ZeRO 0 and 2."""

AT_ZERO_0 = [optimizer("Adafactor", lr=0.002), optimizer("Rprop", lr=1e-5)]
"""Only at ZeRO 0: Adafactor is refused above it; Rprop follows signs alone and amplifies rounding."""


def test_optimizers_match_torch(base: dict[str, Any]) -> None:
    cases = [(optimizer_config, stage) for optimizer_config in EXACT for stage in (0, 2)] + [
        (optimizer_config, 0) for optimizer_config in AT_ZERO_0
    ]
    plain, jobs = [], []
    for optimizer_config, stage in cases:
        params = {k: v for k, v in optimizer_config["params"].items() if k not in ("torch_adam", "adam_w_mode")}
        plain.append((with_values(base, deepspeed__optimizer={**optimizer_config, "params": params}), STEPS))
        config = with_values(base, deepspeed__optimizer=optimizer_config, deepspeed__zero_optimization={"stage": stage})
        jobs.append((config, STEPS))
    expected, results = run_ranks(train_bare, 1, plain)[0], run_ranks(train, 2, jobs)[0]
    for about, (curve, weights, _), reference in zip(cases, results, expected, strict=True):
        np.testing.assert_allclose(curve, reference[0], rtol=2e-5, err_msg=str(about))
        for name in weights:
            np.testing.assert_allclose(weights[name], reference[1][name], atol=2e-5, rtol=0, err_msg=f"{about} {name}")


@pytest.mark.matrix
def test_muon_matches_across_layouts(base: dict[str, Any]) -> None:
    optimizer_config = optimizer("Muon", lr=0.01, momentum=0.9, weight_decay=0.0, adam_lr=0.002)
    config = with_values(base, deepspeed__optimizer=optimizer_config)
    stages = [with_values(config, deepspeed__zero_optimization={"stage": stage, "reduce_scatter": stage < 3})
              for stage in (1, 2, 3)]  # fmt: skip
    alone = run_ranks(train, 1, [(stages[0], STEPS)])[0][0]
    for curve, weights, _ in run_ranks(train, 2, [(c, STEPS) for c in stages])[0]:
        np.testing.assert_allclose(np.array(curve)[:, 0], np.array(alone[0])[:, 0], rtol=1e-4)
        for name in weights:
            np.testing.assert_allclose(weights[name], alone[1][name], atol=2e-3, rtol=0, err_msg=name)


@pytest.mark.matrix
def test_offloaded_optimizers_match_torch(base: dict[str, Any]) -> None:
    """Lion and Adagrad as DeepSpeed's CPU extensions (each compiles for half a minute, once), and Rprop."""
    cases = [optimizer("Lion", lr=1e-4, betas=[0.9, 0.99]), optimizer("Adagrad", lr=0.005, eps=1e-3)]
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    jobs = [(with_values(base, deepspeed__optimizer=o, deepspeed__zero_optimization=zero), STEPS) for o in cases]
    expected = run_ranks(train_bare, 1, jobs)[0]
    for (curve, _, _), reference in zip(run_ranks(train, 2, jobs)[0], expected, strict=True):
        np.testing.assert_allclose(np.array(curve)[:, 0], np.array(reference[0])[:, 0], rtol=1e-4)


SCHEDULERS = [
    ("WarmupLR", {"warmup_max_lr": 0.003, "warmup_num_steps": 3, "warmup_type": "linear"}),
    ("WarmupDecayLR", {"total_num_steps": 8, "warmup_max_lr": 0.003, "warmup_num_steps": 3}),
    ("WarmupCosineLR", {"total_num_steps": 8, "warmup_num_steps": 3, "cos_min_ratio": 0.1}),
    ("OneCycle", {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3, "cycle_first_step_size": 3}),
    ("LRRangeTest", {"lr_range_test_min_lr": 1e-4, "lr_range_test_step_size": 2}),
    ("StepLR", {"step_size": 2, "gamma": 0.5}),
    ("CosineAnnealingLR", {"T_max": 8}),
]


def test_schedulers_match_their_class(base: dict[str, Any]) -> None:
    jobs = [
        (with_values(base, deepspeed__scheduler={"type": optimizer_config, "params": params}), 6)
        for optimizer_config, params in SCHEDULERS
    ]
    results = run_ranks(learning_rates, 1, jobs)[0]
    for (config, steps), measured in zip(jobs, results, strict=True):
        assert measured == pytest.approx(scheduled_learning_rates(config, steps)), config["deepspeed"]["scheduler"]


def test_bf16_tracks_fp32(base: dict[str, Any]) -> None:
    reference = run_ranks(train_bare, 1, [(base, 8)])[0][0][0]
    half = with_values(base, deepspeed__bf16={"enabled": True})
    jobs = [(with_values(half, deepspeed__zero_optimization={"stage": stage}), 8) for stage in (0, 1, 2, 3)]
    for curve, _, _ in run_ranks(train, 2, jobs)[0]:
        np.testing.assert_allclose(np.array(curve)[:, 0], np.array(reference)[:, 0], rtol=0.01)
        np.testing.assert_allclose(np.array(curve)[:, 1], np.array(reference)[:, 1], rtol=0.1)


def test_bf16_first_steps_agree_across_zero_stages(base: dict[str, Any]) -> None:
    """As far as rounding allows: no stage may begin with a step of its own."""
    config = with_values(base, deepspeed__bf16={"enabled": True},
                         deepspeed__optimizer=optimizer("AdamW", lr=0.01, weight_decay=0.1))  # fmt: skip
    stages = [with_values(config, deepspeed__zero_optimization={"stage": stage}) for stage in (0, 1, 2)]
    jobs = [(stages[0], 0), *((stage, 2) for stage in stages)]
    before, *after = [weights for _, weights, _ in run_ranks(train, 1, jobs)[0]]
    for other in (after[0], after[2]):
        for name, expected in after[1].items():
            change = np.linalg.norm(expected - before[name])
            assert np.linalg.norm(other[name] - expected) < 0.05 * change, name


def test_bf16_tracks_fp32_with_tensor_parallelism(base: dict[str, Any]) -> None:
    reference = run_ranks(train_bare, 1, [(base, 8)])[0][0][0]
    half = with_values(base, deepspeed__bf16={"enabled": True}, parallel__tensor=2)
    jobs = [(with_values(half, deepspeed__zero_optimization={"stage": stage}), 8) for stage in (0, 1, 3)]
    jobs.append((with_values(half, parallel__sequence_parallel=True), 8))
    for curve, _, _ in run_ranks(train, 2, jobs)[0]:
        np.testing.assert_allclose(np.array(curve)[:, 0], np.array(reference)[:, 0], rtol=0.01)
        np.testing.assert_allclose(np.array(curve)[:, 1], np.array(reference)[:, 1], rtol=0.1)


def test_mixture_matches_with_tensor_parallelism(base: dict[str, Any]) -> None:
    """Its load-balancing loss is the same number, and reaches the router once."""
    config = with_values(base, model={"config": {**MIXTRAL, "router_aux_loss_coef": 0.5, "vocab_size": 323}},
                         deepspeed__optimizer=optimizer("SGD", lr=1.0))  # fmt: skip
    cut = with_values(config, parallel__tensor=2)
    assert run_ranks(auxiliary_loss, 2, cut)[0] == pytest.approx(run_ranks(auxiliary_loss, 1, config)[0], rel=1e-6)
    (_, alone, _) = run_ranks(train, 1, [(config, 1)])[0][0]
    for stage in (0, 3):
        (_, weights, _) = run_ranks(train, 2, [(with_values(cut, deepspeed__zero_optimization={"stage": stage}), 1)])[
            0
        ][0]
        assert weights.keys() == alone.keys()
        for name in alone:
            np.testing.assert_allclose(weights[name], alone[name], atol=2e-6, rtol=0, err_msg=name)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("other samples", "read different samples"),
        ("a norm left whole", "q_norm.weight.*replicated_with_grad_allreduce"),
    ],
)
def test_first_step_detects_faults(fault: str, words: str, base: dict[str, Any]) -> None:
    """What neither the configuration nor the loss shows."""
    qwen = {"model_type": "qwen3", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    config = with_values(base, model={"config": qwen}, parallel__tensor=2)
    if fault == "a norm left whole":
        config["parallel"]["tensor_plan"] = {"layers.*.self_attn.q_norm": "replicate:a mistake"}
    with pytest.raises(AssertionError, match=f"(?s){words}"):
        run_ranks(train, 2, [(config, 1)], fault if fault == "other samples" else "")


@pytest.mark.parametrize("model", [GPT2, {**MIXTRAL, "tie_word_embeddings": True}], ids=["gpt2", "mixtral tied"])
def test_zero3_initial_weights_match(model: dict[str, Any], base: dict[str, Any]) -> None:
    """ZeRO-3 takes each block away as it is made; the others make the model whole."""
    config = with_values(base, model={"config": model})
    whole, parted = ({"stage": stage, "stage3_param_persistence_threshold": 0} for stage in (0, 3))
    jobs = [(with_values(config, deepspeed__zero_optimization=zero), 0) for zero in (whole, parted)]
    (_, expected, _), (_, results, _) = run_ranks(train, 2, jobs)[0]
    assert results.keys() == expected.keys()
    for name in expected:
        assert np.array_equal(results[name], expected[name]), name


def test_mixture_auxiliary_loss_matches_across_layouts(base: dict[str, Any]) -> None:
    config = with_values(base, model={"config": {**MIXTRAL, "router_aux_loss_coef": 0.5}},
                         deepspeed__optimizer=optimizer("SGD", lr=1.0))  # fmt: skip
    values = [run_ranks(auxiliary_loss, world, config)[0] for world in (1, 2)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert values[0] > 0.1
    silent = with_values(config, model__config__router_aux_loss_coef=0.0)
    (_, alone, _), (_, without, _) = run_ranks(train, 1, [(config, 1), (silent, 1)])[0]
    for stage in (0, 3):
        job = (with_values(config, deepspeed__zero_optimization={"stage": stage}), 1)
        weights = run_ranks(train, 2, [job])[0][0][1]
        for name in alone:
            np.testing.assert_allclose(weights[name], alone[name], atol=2e-6, rtol=0, err_msg=name)
    router = next(name for name in alone if "gate.weight" in name or "router" in name)
    assert np.abs(alone[router] - without[router]).max() > 1e-4, "the auxiliary loss must reach the router"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_unlogged_step_adds_no_sync_and_no_collective(stage: int, base: dict[str, Any]) -> None:
    config = with_values(base, deepspeed__zero_optimization={"stage": stage})
    for quiet, logging, plain in run_ranks(count_events, 2, config):
        assert quiet.ours == {}
        assert sum(quiet.theirs.values()) <= sum(plain.theirs.values())
        assert {name: n for name, n in logging.ours.items() if name != "host read"} == {"all_gather": 1}
        assert logging.ours["host read"] >= 1, "the counter must see what is there"
