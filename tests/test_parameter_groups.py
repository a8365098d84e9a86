"""Weights without decay and with scaled learning rates, in every layout, against torch's own parameter groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.checkpoint_jobs import read_state, run_jobs
from tests.configs import with_values
from tests.harness import run_command, run_ranks
from tests.reference_optimizers import scheduled_learning_rates
from tests.training_jobs import Outcome, learning_rates, train, train_bare
from trainer.checkpoint.saved import checkpoint_name
from trainer.config.deepspeed import weight_decay
from trainer.config.load import check_config
from trainer.config.schema import TrainingSection
from trainer.engine.parameter_groups import ParameterGroups
from trainer.errors import ConfigError
from trainer.model import WeightOptions, build_model, weight_options
from trainer.run_identity import refuse_identity_change

STEPS = 6
SCALES = {"model.embed_tokens.weight": 0.5, "*.mlp.*": 2.0}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.5},
    "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.5},
    "Muon": {"lr": 0.02, "adam_lr": 0.01, "momentum": 0.9, "eps": 1e-3, "weight_decay": 0.5},
    "Lion": {"lr": 0.002, "betas": [0.9, 0.99], "weight_decay": 5.0},
}
WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.02, "warmup_num_steps": 3, "warmup_type": "linear"}}

Layout = dict[str, Any]
OFFLOAD = {"device": "cpu"}


@pytest.fixture(scope="module")
def base(base: dict[str, Any]) -> dict[str, Any]:
    """Tied embeddings, and biases of the MLP: those of keys have no gradient, whose rounding Adam and Lion amplify."""
    return with_values(
        base,
        data__validation=[],
        data__packing="none",
        model__config__mlp_bias=True,
        model__config__tie_word_embeddings=True,
        training__learning_rate_scales=SCALES,
    )


def with_optimizer(base: dict[str, Any], name: str, **values: Any) -> dict[str, Any]:
    return with_values(base, deepspeed__optimizer={"type": name, "params": OPTIMIZERS[name]}, **values)


def layout(pipeline: int = 1, tensor: int = 1, precision: str = "", **zero: Any) -> Layout:
    values = {"parallel__pipeline": pipeline, "parallel__tensor": tensor, "deepspeed__zero_optimization": zero}
    return values | ({f"deepspeed__{precision}": {"enabled": True}} if precision else {})


def assert_equal(outcome: Outcome, expected: Outcome, tolerance: float, *, by_norm: bool = False) -> None:
    """Compare losses, and each weight relative to its largest element, or to its norm."""
    losses, expected_losses = (np.array(curve)[:, 0] for curve in (outcome[0], expected[0]))
    np.testing.assert_allclose(losses, expected_losses, rtol=tolerance)
    assert outcome[1].keys() == expected[1].keys()
    for name, weight in expected[1].items():
        if by_norm:
            error = np.linalg.norm(outcome[1][name] - weight) / np.linalg.norm(weight)
            assert error < tolerance, f"{name} {error}"
            continue
        limit = tolerance * max(np.abs(weight).max(), 0.01)
        np.testing.assert_allclose(outcome[1][name], weight, atol=limit, rtol=0, err_msg=name)


def compare(
    cases: list[tuple[dict[str, Any], Layout]], subtests: pytest.Subtests, tolerance: float, *, by_norm: bool = False
) -> None:
    """Train every configuration in its layout on 2 ranks, and in a plain loop of one process."""
    configs = {id(config): with_values(config, **values) for config, values in cases}
    expected = dict(zip(configs, run_ranks(train_bare, 1, [(c, STEPS) for c in configs.values()])[0], strict=True))
    by_topology: dict[tuple[int, int], list[tuple[dict[str, Any], Layout]]] = {}
    for config, values in cases:
        topology = values["parallel__pipeline"], values["parallel__tensor"]
        by_topology.setdefault(topology, []).append((config, values))
    for group in by_topology.values():
        jobs = [(with_values(config, **values), STEPS) for config, values in group]
        for (config, values), outcome in zip(group, run_ranks(train, 2, jobs)[0], strict=True):
            with subtests.test(optimizer=config["deepspeed"]["optimizer"]["type"], layout=values):
                assert_equal(outcome, expected[id(config)], tolerance, by_norm=by_norm)


def test_parameter_groups_train_as_torch(base: dict[str, Any], subtests: pytest.Subtests) -> None:
    adam = with_optimizer(base, "AdamW")
    scheduled = with_optimizer(base, "SGD", deepspeed__scheduler=WARMUP)
    compare(
        [
            (adam, layout(stage=1)),
            (scheduled, layout(stage=3)),
            (adam, layout(pipeline=2, stage=0)),
            (scheduled, layout(tensor=2, stage=0)),
        ],
        subtests,
        2e-4,
    )


def test_comparison_detects_missing_parameter_groups(base: dict[str, Any]) -> None:
    """Negative control: both the decay and the scales are large enough to be seen."""
    config = with_optimizer(base, "AdamW")
    (expected,) = run_ranks(train_bare, 1, [(config, STEPS)])[0]
    jobs = [
        with_values(config, training__learning_rate_scales={}),
        with_values(config, training__weight_decay_exclude=[]),
    ]
    for outcome in run_ranks(train, 1, [(job, STEPS) for job in jobs])[0]:
        with pytest.raises(AssertionError):
            assert_equal(outcome, expected, 1e-2)


ZERO = [layout(stage=stage) for stage in (0, 1, 2, 3)]
OFFLOADED = [layout(stage=stage, offload_optimizer=OFFLOAD) for stage in (1, 2, 3)]
PIPELINES = [layout(pipeline=2, stage=stage) for stage in (0, 1)]
TENSOR = [layout(tensor=2, stage=stage) for stage in (0, 1, 2, 3)]
MATRIX: dict[str, list[Layout]] = {
    "AdamW": [*ZERO, *OFFLOADED, *PIPELINES, *TENSOR],
    "SGD": [*ZERO, *PIPELINES, *TENSOR],
    "Lion": [
        *OFFLOADED,
        layout(pipeline=2, stage=1, offload_optimizer=OFFLOAD),
        layout(tensor=2, stage=2, offload_optimizer=OFFLOAD),
    ],
    "Muon": [
        *ZERO[:3],
        layout(stage=3, reduce_scatter=False),
        *OFFLOADED[:2],
        layout(stage=3, reduce_scatter=False, offload_optimizer=OFFLOAD),
        *PIPELINES,
    ],
}
"""On CPUs, DeepSpeed has Lion for offload only; Muon needs full matrices, so no tensor parallelism."""


@pytest.mark.matrix
@pytest.mark.parametrize("optimizer", MATRIX)
def test_parameter_groups_train_as_torch_in_every_layout(
    optimizer: str, base: dict[str, Any], subtests: pytest.Subtests
) -> None:
    config = with_optimizer(base, optimizer)
    compare([(config, values) for values in MATRIX[optimizer]], subtests, 2e-4)


@pytest.mark.matrix
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_parameter_groups_train_in_bf16(optimizer: str, base: dict[str, Any], subtests: pytest.Subtests) -> None:
    """Equal up to rounding; without groups the difference is larger."""
    config = with_optimizer(base, optimizer)
    layouts = [layout(stage=stage, precision="bf16") for stage in (0, 1, 2, 3)]
    layouts += [layout(pipeline=2, stage=stage, precision="bf16") for stage in (0, 1)]
    compare([(config, values) for values in layouts], subtests, 0.02, by_norm=True)
    (expected,) = run_ranks(train_bare, 1, [(config, STEPS)])[0]
    without = with_values(config, training__weight_decay_exclude=[], **layouts[1])
    with pytest.raises(AssertionError, match=r"weight|bias"):
        assert_equal(run_ranks(train, 2, [(without, STEPS)])[0][0], expected, 0.02, by_norm=True)


# Groups that some ranks have none of ----------------------------------------------------------------------------------

LOPSIDED = {"deepspeed__train_batch_size": 12, "model__config__tie_word_embeddings": False}
GPT_OSS = {
    "model_type": "gpt_oss",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 4,
    "sliding_window": 16,
    "rope_scaling": None,
    "layer_types": ["sliding_attention", "full_attention"],
}
"""Every token goes to all experts, so that rounding cannot reroute one. The bias of the experts' last product is
trained on the first tensor rank only."""


def compare_norms(config: dict[str, Any], layouts: list[Layout], ranks: int) -> None:
    """Compare losses, norms and weights with a plain loop of one process."""
    (expected,) = run_ranks(train_bare, 1, [(config, STEPS)])[0]
    outcomes = run_ranks(train, ranks, [(with_values(config, **values), STEPS) for values in layouts])[0]
    for values, outcome in zip(layouts, outcomes, strict=True):
        np.testing.assert_allclose(np.array(outcome[0]), np.array(expected[0]), rtol=2e-4, err_msg=str(values))
        assert_equal(outcome, expected, 2e-4)


def group_on_first_stage_only(base: dict[str, Any]) -> dict[str, Any]:
    scales = {"model.embed_tokens.weight": 0.5}
    return with_optimizer(base, "AdamW", **LOPSIDED, training__learning_rate_scales=scales)


def group_on_first_tensor_rank_only(base: dict[str, Any]) -> dict[str, Any]:
    training = {"learning_rate_scales": {"*.experts.down_proj_bias": 2.0}, "weight_decay_exclude": ["*bias", "*norm*"]}
    training |= {"max_steps": STEPS}
    return with_optimizer(base, "AdamW", model={"config": GPT_OSS}, training=training)


def test_pipeline_stage_without_a_group_has_correct_norm(base: dict[str, Any]) -> None:
    compare_norms(group_on_first_stage_only(base), [layout(pipeline=2, stage=1)], 2)


def test_tensor_rank_without_a_group_has_correct_norm(base: dict[str, Any]) -> None:
    compare_norms(group_on_first_tensor_rank_only(base), [layout(tensor=2, stage=1)], 2)


@pytest.mark.matrix
def test_ranks_without_a_group_have_correct_norm_in_every_layout(base: dict[str, Any]) -> None:
    """By default, Muon's middle stage has neither embeddings nor a head, so one group less."""
    pipelines = [layout(pipeline=2, stage=1, offload_optimizer=OFFLOAD), layout(pipeline=2, stage=0)]
    compare_norms(group_on_first_stage_only(base), pipelines, 4)
    tensor = [layout(tensor=2, stage=stage) for stage in (0, 1, 2, 3)]
    tensor += [layout(tensor=2, stage=stage, offload_optimizer=OFFLOAD) for stage in (1, 2, 3)]
    compare_norms(group_on_first_tensor_rank_only(base), tensor, 4)
    muon = with_optimizer(base, "Muon", **LOPSIDED, training__learning_rate_scales={})
    compare_norms(with_values(muon, model__config__num_hidden_layers=6), [layout(pipeline=3, stage=1)], 3)


@pytest.mark.matrix
def test_tensor_rank_without_a_group_has_correct_norm_in_bf16_zero_0(base: dict[str, Any]) -> None:
    """An optimizer without a fused kernel: the norm includes the shards of the other tensor rank."""
    config = with_values(
        group_on_first_tensor_rank_only(base), deepspeed__optimizer={"type": "SGD", "params": OPTIMIZERS["SGD"]}
    )
    (expected,) = run_ranks(train_bare, 1, [(config, 3)])[0]
    outcome = run_ranks(train, 2, [(with_values(config, **layout(tensor=2, stage=0, precision="bf16")), 3)])[0][0]
    np.testing.assert_allclose(np.array(outcome[0]), np.array(expected[0]), rtol=0.01)


# Resuming -------------------------------------------------------------------------------------------------------------


def check_resume(config: dict[str, Any], first: Layout, others: list[Layout], directory: Path) -> None:
    """Compare steps 4 to 6 after a checkpoint of step 3: bitwise in the layout that wrote it, by losses in others."""
    config = with_values(config, training__max_steps=STEPS)
    unbroken = with_values(config, run__output_dir=str(directory / "unbroken"), **first)
    resumed = with_values(
        config, checkpoint__resume=str(directory / "unbroken" / "checkpoints" / checkpoint_name(STEPS // 2))
    )
    same = with_values(resumed, run__output_dir=str(directory / "same"), **first)
    jobs = [(unbroken, STEPS, (STEPS // 2, STEPS)), (same, STEPS, (STEPS,))]
    unbroken_losses, resumed_losses = run_ranks(run_jobs, 2, jobs)[0]
    assert resumed_losses == {step: unbroken_losses[step] for step in range(STEPS // 2 + 1, STEPS + 1)}
    state, expected = (
        read_state(directory / run / "checkpoints" / checkpoint_name(STEPS)) for run in ("same", "unbroken")
    )
    assert state.keys() == expected.keys()
    assert [key for key in expected if not state[key].equal(expected[key])] == []
    for index, other in enumerate(others):
        in_other_layout = with_values(resumed, run__output_dir=str(directory / f"other-{index}"), **other)
        (losses,) = run_ranks(run_jobs, 2, [(in_other_layout, STEPS, (STEPS,))])[0]
        assert losses == pytest.approx(resumed_losses, rel=1e-4), other
        state = read_state(directory / f"other-{index}" / "checkpoints" / checkpoint_name(STEPS))
        for key in [key for key in expected if key.startswith("weight/")]:
            limit = 2e-4 * max(expected[key].abs().max().item(), 0.01)
            assert torch.allclose(state[key], expected[key], rtol=0, atol=limit), (other, key)


def test_run_with_groups_resumes_in_other_layouts(base: dict[str, Any], tmp_path: Path) -> None:
    check_resume(with_optimizer(base, "AdamW"), layout(stage=1), [layout(pipeline=2, stage=0)], tmp_path)


RESUMED: list[tuple[str, Layout, list[Layout]]] = [
    ("AdamW", layout(stage=0), [layout(stage=3), layout(tensor=2, stage=1)]),
    ("AdamW", layout(stage=3), [layout(stage=2), layout(pipeline=2, stage=1)]),
    ("AdamW", layout(pipeline=2, stage=1), [layout(stage=0), layout(tensor=2, stage=3)]),
    ("AdamW", OFFLOADED[1], [layout(stage=1)]),
    ("AdamW", layout(stage=0, precision="bf16"), []),
    ("AdamW", layout(stage=1, precision="bf16"), []),
    ("SGD", layout(stage=2), [layout(pipeline=2, stage=0), layout(tensor=2, stage=0)]),
    ("Lion", OFFLOADED[1], [OFFLOADED[2]]),
    ("Muon", layout(stage=0), [layout(stage=1), layout(stage=3, reduce_scatter=False)]),
    ("Muon", layout(stage=1), [layout(stage=0), OFFLOADED[0], layout(pipeline=2, stage=0)]),
    ("Muon", layout(stage=2), [layout(stage=0)]),
    ("Muon", layout(stage=3, reduce_scatter=False), [layout(stage=1)]),
    ("Muon", OFFLOADED[0], [layout(stage=1), OFFLOADED[1]]),
    ("Muon", layout(stage=3, reduce_scatter=False, offload_optimizer=OFFLOAD), [layout(stage=0)]),
    ("Muon", layout(pipeline=2, stage=1), [layout(stage=1)]),
]


@pytest.mark.matrix
@pytest.mark.parametrize("row", RESUMED, ids=lambda row: f"{row[0]}-{row[1]}")
def test_groups_resume_with_every_optimizer(
    row: tuple[str, Layout, list[Layout]], base: dict[str, Any], tmp_path: Path
) -> None:
    check_resume(with_optimizer(base, row[0]), row[1], row[2], tmp_path)


# Which weights --------------------------------------------------------------------------------------------------------


def undecayed(family: str, exclude: Any = "biases_and_norms", **sizes: Any) -> set[str]:
    config = AutoConfig.for_model(family, **{"num_hidden_layers": 1, "vocab_size": 64} | sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    training = TrainingSection(max_steps=1, weight_decay_exclude=exclude)
    return {name for name, option in weight_options(model, training, decay=0.1).items() if not option.decays}


@pytest.mark.fast
def test_default_excludes_biases_and_norms_by_full_shape() -> None:
    """Norms and biases that are matrices count, too: those of Cohere's heads and of GPT-OSS's experts."""
    assert undecayed("llama") == {
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
    }
    assert {f"model.layers.0.self_attn.{of}_norm.weight" for of in "qk"} < undecayed("cohere", use_qk_norm=True)
    mixture = undecayed("gpt_oss", num_local_experts=2, num_experts_per_tok=1)
    assert "model.layers.0.mlp.experts.gate_up_proj_bias" in mixture
    assert {"model.layers.0.mlp.experts.gate_up_proj", "model.embed_tokens.weight"}.isdisjoint(mixture)
    assert undecayed("llama", ["*norm*", "lm_head.weight"]) == {*undecayed("llama"), "lm_head.weight"}
    assert undecayed("llama", []) == set()


@pytest.mark.fast
def test_weights_with_equal_options_form_one_group(tiny: dict[str, Any]) -> None:
    """No group, no hook, no cost."""
    parameters = list(torch.nn.Linear(2, 2).parameters())
    groups = ParameterGroups({"weight": WeightOptions(), "bias": WeightOptions()})
    assert groups.build(parameters, []) == parameters
    plain = torch.optim.SGD(parameters, lr=0.1)
    groups.install_rate_scales(plain)
    assert "learning_rate_scale" not in plain.param_groups[0]
    loaded = check_config(tiny, world_size=1, device="cpu")
    assert weight_decay(loaded.deepspeed_json) == 0
    options = weight_options(build_model(loaded), loaded.config.training, decay=0)
    assert set(options.values()) == {WeightOptions()}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("kind", "params", "expected"),
    [
        ("AdamW", {}, 0.0),
        ("AdamW", {"weight_decay": 0.3}, 0.3),
        ("AdamW", {"torch_adam": True}, 0.01),
        ("Adam", {"torch_adam": True}, 0.01),
        ("Adam", {"torch_adam": True, "adam_w_mode": False}, 0.0),
        ("SGD", {}, 0.0),
        ("Muon", {}, 0.0),
        ("Rprop", {}, 0.0),
    ],
)
def test_weight_decay_default_equals_optimizer_class(kind: str, params: dict[str, Any], expected: float) -> None:
    assert weight_decay({"optimizer": {"type": kind, "params": params}}) == expected


def test_logged_learning_rate_is_unscaled(base: dict[str, Any]) -> None:
    config = with_optimizer(base, "AdamW", deepspeed__scheduler=WARMUP, training__learning_rate_scales={"*": 0.5})
    muon = with_optimizer(base, "Muon", training__learning_rate_scales={"model.layers.*": 0.5})
    assert run_ranks(learning_rates, 1, [(config, 4), (muon, 1)])[0] == [
        pytest.approx(scheduled_learning_rates(config, 4)),
        [0.02],
    ]


def test_dry_run_lists_parameter_groups(base: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(with_optimizer(base, "AdamW")))
    output = run_command("launch/train.py", "--config", str(tmp_path / "config.json"), "--dry_run").out
    assert "6 weights (12,288 parameters): weight decay 0.5, learning rate x 2\n" in output
    assert "5 weights (160 parameters): weight decay 0\n" in output


def test_changed_parameter_groups_are_refused_on_resume(base: dict[str, Any]) -> None:
    loaded = check_config(base, world_size=1, device="cpu")
    other = with_values(base, training__weight_decay_exclude=["*.bias"], training__learning_rate_scales={"*": 2.0})
    with pytest.raises(ConfigError) as refused:
        refuse_identity_change(loaded.resolved(), check_config(other, world_size=1, device="cpu"), "the run directory")
    named = {problem.path for problem in refused.value.problems}
    scales = {f"training.learning_rate_scales.{pattern}" for pattern in (*SCALES, "*")}
    assert named == {"training.weight_decay_exclude", *scales}
