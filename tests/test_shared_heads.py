"""Fewer key/value heads than tensor ranks: gradients, losses and exported weights of a run, the gradient watch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.configs import tiny_config, with_values
from tests.harness import run_command, run_ranks
from tests.test_families import describe
from tests.training_jobs import _train, job_topology, train_bare
from tools.parity.families import Family
from tools.parity.gradient_proof import Verdict, prove
from trainer.distributed import Launch, joined_world
from trainer.errors import PlanError
from trainer.sharding import shard_of
from trainer.tensor_parallel import mapper

STEPS = 4


def single_head(model_type: str, **fields: Any) -> Family:
    return Family(model_type, variant="one key/value head", fields={"num_key_value_heads": 1, **fields})


SINGLE_HEAD = [
    single_head("llama"),
    single_head("qwen3"),
    single_head("gemma2"),
    single_head("glm"),
    single_head("mixtral"),
    single_head("gemma3n_text"),  # its last layers use the keys and values of others
    single_head("zamba"),  # one attention in several layers
]

NORMS = [
    Family("cohere", variant="a norm's weights for each head", fields={"use_qk_norm": True}),
    Family("stablelm", variant="a norm for each head", fields={"qk_layernorm": True}),
    Family("phi", variant="one norm for all heads", fields={"qk_layernorm": True}),
    Family("glm4_moe", variant="one norm for all heads", fields={"use_qk_norm": True}),
    Family("olmo2", variant="a norm over all heads"),
    Family("olmoe", variant="a norm over all heads"),
]
"""Norms of queries and keys, with heads that ranks share."""


def prove_in_stages(families: list[Family]) -> list[Verdict]:
    return prove(families, pipeline=2)


def test_single_key_value_head_gradients_match() -> None:
    verdicts = run_ranks(prove, 2, SINGLE_HEAD)[0]
    assert [describe(v) for v in verdicts if v.outcome != "right"] == []


def test_heads_shared_by_four_ranks_gradients_match() -> None:
    two = [Family(name, variant="two heads", fields={"num_key_value_heads": 2}) for name in ("llama", "gemma2")]
    verdicts = run_ranks(prove, 4, [*SINGLE_HEAD[:2], *two])[0]
    assert [describe(v) for v in verdicts if v.outcome != "right"] == []


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.matrix), 4])
def test_norms_over_shared_heads_gradients_match(ranks: int) -> None:
    """One head on two ranks, two heads on four."""
    families = [replace(f, fields=f.fields | {"num_key_value_heads": ranks // 2}) for f in NORMS]
    verdicts = run_ranks(prove, ranks, families)[0]
    assert [describe(v) for v in verdicts if v.outcome != "right"] == []


def test_optional_weights_gradients_match() -> None:
    """Of published models that have it: Command R+, GLM-4.5, StableLM 2 12B, Phi, ERNIE, X-MOD."""
    optional = [
        Family("ernie", "masked_lm", "task ids", {"use_task_id": True}),
        Family("xmod", "masked_lm", "a norm before the adapters", {"adapter_layer_norm": True}),
        Family("xglm", variant="cross-attention", fields={"add_cross_attention": True}),
        Family("blt", variant="tied", fields={"tie_word_embeddings": True}),
        Family("cohere2_moe", variant="shared experts", fields={"num_shared_experts": 1}),
        Family("roformer", variant="projected", fields={"embedding_size": 32}),
        Family("xlm", variant="languages", fields={"n_langs": 2}),
    ]
    verdicts = run_ranks(prove, 2, [*NORMS[:4], *optional])[0]
    assert [describe(v) for v in verdicts if v.outcome != "right"] == []


def prove_with_wrong_norms(families: list[Family]) -> list[Verdict]:
    return prove(families, {"layers.*.self_attn.q_layernorm": "local_params"})


def test_norms_of_wrong_heads_are_detected() -> None:
    """Without `per_head_norms` each rank applies the norms of the first heads."""
    (verdict,) = run_ranks(prove_with_wrong_norms, 2, [NORMS[1]])[0]
    assert verdict.outcome == "wrong"


@pytest.mark.matrix
def test_single_key_value_head_in_stages_gradients_match() -> None:
    (verdict,) = run_ranks(prove_in_stages, 4, [single_head("llama")])[0]
    assert verdict.outcome == "right", describe(verdict)


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def llama(corpus: Path, shared_cache: Path, tmp_path: Path) -> dict[str, Any]:
    """Return a run with one key/value head, with the attention kernels of a run."""
    config = tiny_config(corpus, shared_cache, tmp_path / "run")
    return with_values(
        config,
        data__validation=[],
        data__packing="concatenate",
        model__config__num_key_value_heads=1,
        training__max_steps=STEPS,
        training__log_every_steps=1,
    )


def test_launch_trains_and_exports_single_key_value_head(llama: dict[str, Any], tmp_path: Path) -> None:
    """Compare with one process without an engine, also when one process trains the second half from a checkpoint."""
    ((curve, weights, _),) = run_ranks(train_bare, 1, [(llama, STEPS)])[0]
    half = with_values(llama, parallel__tensor=2, training__max_steps=STEPS // 2)
    for config, world in ((with_values(half, run__seed=11), 2), (llama, 1)):
        (tmp_path / "config.json").write_text(json.dumps(config))
        result = run_command("launch/train.py", "--config", str(tmp_path / "config.json"), world=world)
        assert result.status == 0, result.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([(row["loss"], row["grad_norm"]) for row in rows], curve, rtol=2e-5)
    exported = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert exported.keys() == weights.keys()
    for name, expected in weights.items():
        np.testing.assert_allclose(exported[name], expected, atol=2e-5, rtol=0, err_msg=name)


# Gradient watch ------------------------------------------------------------------------------------------------------


def messages_without_sums(config: dict[str, Any], cases: list[str]) -> list[str]:
    """Return what the first step reports if gradients are not summed; a case is a part of the weights' names."""
    launch = Launch.from_environment()
    original, messages = mapper.sum_gradient, []
    with joined_world(launch, job_topology(config, launch), seed=config["run"]["seed"]) as world:
        for case in cases:
            mapper.sum_gradient = lambda parameter, group, case=case: (
                None if case in shard_of(parameter).name else original(parameter, group)
            )
            try:
                _train(config, 1, world, "")
                messages.append("")
            except PlanError as error:
                messages.append(str(error.problems[0]))
    return messages


@pytest.mark.parametrize(("heads", "cases"), [(1, ["v_proj"]), (2, ["k_proj", "q_norm"])])
def test_first_step_detects_missing_gradient_sum(heads: int, cases: list[str], llama: dict[str, Any]) -> None:
    """One head on two ranks; two heads on four, each on two of them."""
    ranks = 2 * heads
    config = with_values(
        llama,
        parallel__tensor=ranks,
        model__config__num_key_value_heads=heads,
        model__config__model_type="qwen3",
        model__config__head_dim=8,
    )
    for rank in run_ranks(messages_without_sums, ranks, config, cases):
        for case, message in zip(cases, rank, strict=True):
            holders = ranks if case == "q_norm" else 2
            assert f"{case}.weight is held by {holders} tensor ranks, and its gradients there differ by" in message
