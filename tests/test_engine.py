"""The engine beyond layouts: optimizers, schedules, precision, hooks, communication and synchronization."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.utils import safe_get_full_grad

from tests.configs import optimizer, with_values
from tests.harness import run_ranks
from tests.reference_optimizers import scheduled_learning_rates
from tests.test_model import GPT2, MIXTRAL
from tests.training_jobs import (
    Curve,
    Weights,
    auxiliary_loss,
    count_events,
    job_topology,
    learning_rates,
    load_job,
    train,
    train_bare,
)
from trainer.assembly import assemble
from trainer.data.batches import StepBatch
from trainer.distributed import Launch, joined_world
from trainer.engine.loss_normalization import LossNormalization
from trainer.tasks import MicroBatch, TaskLoss
from trainer.topology import GRADIENT_AXES, Axis, Topology

STEPS = 4


@pytest.fixture(scope="module")
def base(base: dict[str, Any]) -> dict[str, Any]:
    return with_values(base, data__validation=[], data__packing="none")


def assert_curves_close(curve: Curve, expected: Curve, *, loss_rtol: float, norm_rtol: float) -> None:
    """Compare losses and gradient norms by step."""
    (losses, norms), (expected_losses, expected_norms) = np.array(curve).T, np.array(expected).T
    np.testing.assert_allclose(losses, expected_losses, rtol=loss_rtol)
    np.testing.assert_allclose(norms, expected_norms, rtol=norm_rtol)


def assert_weights_close(weights: Weights, expected: Weights, atol: float) -> None:
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_allclose(weights[name], weight, atol=atol, rtol=0, err_msg=name)


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
"""Compared with torch's optimizer in a plain loop of one process, at ZeRO 0 and 2."""

AT_ZERO_0 = [optimizer("Adafactor", lr=0.002), optimizer("Rprop", lr=1e-5)]
"""Compared at ZeRO 0 only: Adafactor is refused above it; Rprop follows signs alone and amplifies rounding."""


def test_optimizers_match_torch(base: dict[str, Any], subtests: pytest.Subtests) -> None:
    cases = [(optimizer_config, stage) for optimizer_config in EXACT for stage in (0, 2)]
    cases += [(optimizer_config, 0) for optimizer_config in AT_ZERO_0]
    plain, jobs = [], []
    for optimizer_config, stage in cases:
        params = {k: v for k, v in optimizer_config["params"].items() if k not in ("torch_adam", "adam_w_mode")}
        plain.append((with_values(base, deepspeed__optimizer={**optimizer_config, "params": params}), STEPS))
        config = with_values(base, deepspeed__optimizer=optimizer_config, deepspeed__zero_optimization={"stage": stage})
        jobs.append((config, STEPS))
    expected, results = run_ranks(train_bare, 1, plain)[0], run_ranks(train, 2, jobs)[0]
    for (optimizer_config, stage), outcome, reference in zip(cases, results, expected, strict=True):
        with subtests.test(optimizer=optimizer_config, zero=stage):
            assert_curves_close(outcome[0], reference[0], loss_rtol=2e-5, norm_rtol=2e-5)
            assert_weights_close(outcome[1], reference[1], atol=2e-5)


@pytest.mark.matrix
def test_muon_matches_across_layouts(base: dict[str, Any], subtests: pytest.Subtests) -> None:
    optimizer_config = optimizer("Muon", lr=0.01, momentum=0.9, weight_decay=0.0, adam_lr=0.002)
    config = with_values(base, deepspeed__optimizer=optimizer_config)
    stages = [
        with_values(config, deepspeed__zero_optimization={"stage": stage, "reduce_scatter": stage < 3})
        for stage in (1, 2, 3)
    ]
    expected = run_ranks(train, 1, [(stages[0], STEPS)])[0][0]
    for stage, outcome in enumerate(run_ranks(train, 2, [(config, STEPS) for config in stages])[0], start=1):
        with subtests.test(zero=stage):
            assert_curves_close(outcome[0], expected[0], loss_rtol=1e-4, norm_rtol=1e-2)
            assert_weights_close(outcome[1], expected[1], atol=2e-3)


@pytest.mark.matrix
def test_offloaded_optimizers_match_torch(base: dict[str, Any]) -> None:
    """Lion and Adagrad are CPU extensions of DeepSpeed; each compiles for half a minute, once."""
    cases = [optimizer("Lion", lr=1e-4, betas=[0.9, 0.99]), optimizer("Adagrad", lr=0.005, eps=1e-3)]
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    jobs = [(with_values(base, deepspeed__optimizer=o, deepspeed__zero_optimization=zero), STEPS) for o in cases]
    expected = run_ranks(train_bare, 1, jobs)[0]
    for (curve, _, _), reference in zip(run_ranks(train, 2, jobs)[0], expected, strict=True):
        assert_curves_close(curve, reference[0], loss_rtol=1e-4, norm_rtol=1e-2)


SCHEDULERS = [
    ("WarmupLR", {"warmup_max_lr": 0.003, "warmup_num_steps": 3, "warmup_type": "linear"}),
    ("WarmupDecayLR", {"total_num_steps": 8, "warmup_max_lr": 0.003, "warmup_num_steps": 3}),
    ("WarmupCosineLR", {"total_num_steps": 8, "warmup_num_steps": 3, "cos_min_ratio": 0.1}),
    ("OneCycle", {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3, "cycle_first_step_size": 3}),
    ("LRRangeTest", {"lr_range_test_min_lr": 1e-4, "lr_range_test_step_size": 2}),
    ("StepLR", {"step_size": 2, "gamma": 0.5}),
    ("CosineAnnealingLR", {"T_max": 8}),
]


def test_schedulers_match_their_class(base: dict[str, Any], subtests: pytest.Subtests) -> None:
    jobs = [
        (with_values(base, deepspeed__scheduler={"type": class_name, "params": params}), 6)
        for class_name, params in SCHEDULERS
    ]
    results = run_ranks(learning_rates, 1, jobs)[0]
    for (config, steps), measured in zip(jobs, results, strict=True):
        with subtests.test(scheduler=config["deepspeed"]["scheduler"]):
            assert measured == pytest.approx(scheduled_learning_rates(config, steps))


def test_bf16_tracks_fp32(base: dict[str, Any], subtests: pytest.Subtests) -> None:
    reference = run_ranks(train_bare, 1, [(base, 8)])[0][0][0]
    half = with_values(base, deepspeed__bf16={"enabled": True})
    jobs = [(with_values(half, deepspeed__zero_optimization={"stage": stage}), 8) for stage in (0, 1, 2, 3)]
    for stage, (curve, _, _) in enumerate(run_ranks(train, 2, jobs)[0]):
        with subtests.test(zero=stage):
            assert_curves_close(curve, reference, loss_rtol=0.01, norm_rtol=0.1)


def test_bf16_first_steps_agree_across_zero_stages(base: dict[str, Any]) -> None:
    """Equal up to rounding: no stage may start with an additional step."""
    config = with_values(
        base, deepspeed__bf16={"enabled": True}, deepspeed__optimizer=optimizer("AdamW", lr=0.01, weight_decay=0.1)
    )
    stages = [with_values(config, deepspeed__zero_optimization={"stage": stage}) for stage in (0, 1, 2)]
    jobs = [(stages[0], 0), *((stage, 2) for stage in stages)]
    before, *after = [weights for _, weights, _ in run_ranks(train, 1, jobs)[0]]
    for other in (after[0], after[2]):
        for name, expected in after[1].items():
            change = np.linalg.norm(expected - before[name])
            assert np.linalg.norm(other[name] - expected) < 0.05 * change, name


def test_bf16_tracks_fp32_with_tensor_parallelism(base: dict[str, Any], subtests: pytest.Subtests) -> None:
    reference = run_ranks(train_bare, 1, [(base, 8)])[0][0][0]
    half = with_values(base, deepspeed__bf16={"enabled": True}, parallel__tensor=2)
    jobs = [(with_values(half, deepspeed__zero_optimization={"stage": stage}), 8) for stage in (0, 1, 3)]
    jobs.append((with_values(half, parallel__sequence_parallel=True), 8))
    for index, (curve, _, _) in enumerate(run_ranks(train, 2, jobs)[0]):
        with subtests.test(case=("zero 0", "zero 1", "zero 3", "sequence parallel")[index]):
            assert_curves_close(curve, reference, loss_rtol=0.01, norm_rtol=0.1)


def test_mixture_matches_with_tensor_parallelism(base: dict[str, Any]) -> None:
    """The load-balancing loss is the same number, and reaches the router once."""
    config = with_values(
        base,
        model={"config": {**MIXTRAL, "router_aux_loss_coef": 0.5, "vocab_size": 323}},
        deepspeed__optimizer=optimizer("SGD", lr=1.0),
    )
    sharded = with_values(config, parallel__tensor=2)
    assert run_ranks(auxiliary_loss, 2, sharded)[0] == pytest.approx(run_ranks(auxiliary_loss, 1, config)[0], rel=1e-6)
    (_, expected, _) = run_ranks(train, 1, [(config, 1)])[0][0]
    jobs = [(with_values(sharded, deepspeed__zero_optimization={"stage": stage}), 1) for stage in (0, 3)]
    for _, weights, _ in run_ranks(train, 2, jobs)[0]:
        assert_weights_close(weights, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("other samples", "read different samples"),
        ("replicated norm", "q_norm.weight.*replicated_with_grad_allreduce"),
    ],
)
def test_first_step_detects_faults(fault: str, words: str, base: dict[str, Any]) -> None:
    """Faults that neither the configuration nor the loss shows."""
    qwen = {
        "model_type": "qwen3",
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "head_dim": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = with_values(base, model={"config": qwen}, parallel__tensor=2)
    if fault == "replicated norm":
        config["parallel"]["tensor_plan"] = {"layers.*.self_attn.q_norm": "replicate:a mistake"}
    with pytest.raises(AssertionError, match=f"(?s){words}"):
        run_ranks(train, 2, [(config, 1)], fault if fault == "other samples" else "")


@pytest.mark.parametrize("model", [GPT2, {**MIXTRAL, "tie_word_embeddings": True}], ids=["gpt2", "mixtral tied"])
def test_zero3_initial_weights_match(model: dict[str, Any], base: dict[str, Any]) -> None:
    """ZeRO 3 partitions each module as it is initialized; the others initialize the full model."""
    config = with_values(base, model={"config": model})
    settings = [{"stage": stage, "stage3_param_persistence_threshold": 0} for stage in (0, 3)]
    jobs = [(with_values(config, deepspeed__zero_optimization=zero), 0) for zero in settings]
    (_, expected, _), (_, weights, _) = run_ranks(train, 2, jobs)[0]
    assert_weights_close(weights, expected, atol=0)


def test_mixture_auxiliary_loss_matches_across_layouts(base: dict[str, Any]) -> None:
    config = with_values(
        base, model={"config": {**MIXTRAL, "router_aux_loss_coef": 0.5}}, deepspeed__optimizer=optimizer("SGD", lr=1.0)
    )
    values = [run_ranks(auxiliary_loss, world, config)[0] for world in (1, 2)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert values[0] > 0.1
    silent = with_values(config, model__config__router_aux_loss_coef=0.0)
    (_, expected, _), (_, without, _) = run_ranks(train, 1, [(config, 1), (silent, 1)])[0]
    jobs = [(with_values(config, deepspeed__zero_optimization={"stage": stage}), 1) for stage in (0, 3)]
    for _, weights, _ in run_ranks(train, 2, jobs)[0]:
        assert_weights_close(weights, expected, atol=2e-6)
    router = next(name for name in expected if "gate.weight" in name or "router" in name)
    assert np.abs(expected[router] - without[router]).max() > 1e-4, "the auxiliary loss must reach the router"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_unlogged_step_adds_no_sync_and_no_collective(stage: int, base: dict[str, Any]) -> None:
    config = with_values(base, deepspeed__zero_optimization={"stage": stage})
    for quiet, logging, plain in run_ranks(count_events, 2, config):
        assert quiet.ours == {}
        assert sum(quiet.theirs.values()) <= sum(plain.theirs.values())
        assert {name: n for name, n in logging.ours.items() if name != "host read"} == {"all_gather": 1}
        assert logging.ours["host read"] >= 1, "the counter must see reads"


# The hook before the update -------------------------------------------------------------------------------------------

HOOKED: list[dict[str, Any]] = [
    {"deepspeed__zero_optimization": {"stage": 0}},
    {"deepspeed__zero_optimization": {"stage": 2}},
    {"deepspeed__zero_optimization": {"stage": 3}},
    {"parallel__pipeline": 2, "deepspeed__zero_optimization": {"stage": 1}},
    {"parallel__pipeline": 2, "deepspeed__zero_optimization": {"stage": 0}},
]


def hooked_steps(config: dict[str, Any], steps: int) -> list[tuple[list[float], float, bool]]:
    """For each step: norms of the gradients in the hook, by call; the norm of the result; whether weights were old."""
    launch = Launch.from_environment()
    with joined_world(launch, job_topology(config, launch), seed=1) as world:
        trainer = assemble(load_job(config, launch.world_size), world)
        engine = trainer.engine
        outcomes = []
        for batch in trainer.batches.train.steps(1, steps):
            before = {name: weight.clone() for name, weight in engine.full_weights()}
            squares, is_unchanged = [], []

            def look(
                squares: list[Any] = squares, is_unchanged: list[bool] = is_unchanged, before: Any = before
            ) -> None:
                parameters = {id(p): p for model in engine.models for p in model.parameters()}
                squares.append(sum(float(safe_get_full_grad(p).float().square().sum()) for p in parameters.values()))
                is_unchanged.append(all(before[name].equal(weight) for name, weight in engine.full_weights()))

            result = engine.train_step(batch, before_update=look)
            rows = engine.all_gather_scalars(squares)
            stages = {row[0] for row in rows} if world.topology.pipeline == 1 else [row[0] for row in rows]
            outcomes.append(([sum(stages) ** 0.5] * len(squares), float(result.grad_norm), all(is_unchanged)))
        return outcomes


@pytest.mark.parametrize("values", HOOKED, ids=str)
def test_before_update_sees_unclipped_gradients_and_old_weights(values: dict[str, Any], base: dict[str, Any]) -> None:
    config = with_values(base, deepspeed__gradient_clipping=0.01, **values)
    for norms, reported_norm, is_unchanged in run_ranks(hooked_steps, 2, config, 2)[0]:
        assert norms == [pytest.approx(reported_norm, rel=1e-4)], "called once per step"
        assert reported_norm > 0.1
        assert is_unchanged


# Normalization of the loss --------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize("axis", GRADIENT_AXES)
@pytest.mark.parametrize("engine_divides", [False, True])
def test_accumulated_objective_is_loss_per_token(engine_divides: bool, axis: Axis) -> None:
    """Tokens are spread unevenly over 2 ranks with 2 micro-batches each; DeepSpeed averages over the ranks."""
    sums, auxiliary = {(0, 0): 30.0, (0, 1): 2.0, (1, 0): 8.0, (1, 1): 20.0}, 0.5
    micro_batch = MicroBatch({"input_ids": torch.zeros(1, 1)}, torch.zeros(1, 1), num_targets=1)
    batch = StepBatch((micro_batch, micro_batch), tokens=15, samples=4)
    objective = 0.0
    for (rank, _), loss_sum in sums.items():
        normalization = LossNormalization.for_step(batch, Topology(rank, **{axis: 2}), engine_divides=engine_divides)
        loss = TaskLoss(torch.tensor(loss_sum), torch.tensor(loss_sum), torch.zeros(1), {}, torch.tensor(auxiliary))
        objective += float(normalization.objective(loss)) / (2 if engine_divides else 1) / 2
    assert objective == pytest.approx(sum(sums.values()) / 15 + auxiliary)
