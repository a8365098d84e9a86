"""Fewer key/value heads than tensor ranks: gradients, a run's losses and exported weights, and what the watch sees."""

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


def one_head(model_type: str, **fields: Any) -> Family:
    return Family(model_type, variant="one key/value head", fields={"num_key_value_heads": 1, **fields})


ONE_HEAD = [
    one_head("llama"),
    one_head("qwen3"),
    one_head("gemma2"),
    one_head("glm"),
    one_head("mixtral"),
    one_head("gemma3n_text"),  # its last layers use the keys and values of others
    one_head("zamba"),  # one attention in several layers
]

NORMS = [
    Family("cohere", variant="a norm's weights for each head", fields={"use_qk_norm": True}),
    Family("stablelm", variant="a norm for each head", fields={"qk_layernorm": True}),
    Family("phi", variant="one norm for all heads", fields={"qk_layernorm": True}),
    Family("glm4_moe", variant="one norm for all heads", fields={"use_qk_norm": True}),
    Family("olmo2", variant="a norm over all heads"),
    Family("olmoe", variant="a norm over all heads"),
]
"""Norms of queries and keys, in which heads that ranks share take part."""


def in_stages(families: list[Family]) -> list[Verdict]:
    return prove(families, pipeline=2)


def test_single_key_value_head_gradients_match() -> None:
    found = run_ranks(prove, 2, ONE_HEAD)[0]
    assert [describe(v) for v in found if v.outcome != "right"] == []


def test_heads_shared_by_four_ranks_gradients_match() -> None:
    two = [Family(name, variant="two heads", fields={"num_key_value_heads": 2}) for name in ("llama", "gemma2")]
    found = run_ranks(prove, 4, [*ONE_HEAD[:2], *two])[0]
    assert [describe(v) for v in found if v.outcome != "right"] == []


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.matrix), 4])
def test_norms_over_shared_heads_gradients_match(ranks: int) -> None:
    """One head on two ranks, two heads on four."""
    families = [replace(f, fields=f.fields | {"num_key_value_heads": ranks // 2}) for f in NORMS]
    found = run_ranks(prove, ranks, families)[0]
    assert [describe(v) for v in found if v.outcome != "right"] == []


def test_optional_weights_gradients_match() -> None:
    """Of published models that have it: Command R+, GLM-4.5, StableLM 2 12B, Phi, ERNIE, X-MOD."""
    more = [
        Family("ernie", "masked_lm", "task ids", {"use_task_id": True}),
        Family("xmod", "masked_lm", "a norm before the adapters", {"adapter_layer_norm": True}),
        Family("xglm", variant="cross-attention", fields={"add_cross_attention": True}),
        Family("blt", variant="tied", fields={"tie_word_embeddings": True}),
        Family("cohere2_moe", variant="shared experts", fields={"num_shared_experts": 1}),
        Family("roformer", variant="projected", fields={"embedding_size": 32}),
        Family("xlm", variant="languages", fields={"n_langs": 2}),
    ]
    found = run_ranks(prove, 2, [*NORMS[:4], *more])[0]
    assert [describe(v) for v in found if v.outcome != "right"] == []


def norms_of_other_heads(families: list[Family]) -> list[Verdict]:
    return prove(families, {"layers.*.self_attn.q_layernorm": "local_params"})


def test_norms_of_wrong_heads_are_detected() -> None:
    """Each rank would apply the first ones."""
    (verdict,) = run_ranks(norms_of_other_heads, 2, [NORMS[1]])[0]
    assert verdict.outcome == "wrong"


@pytest.mark.matrix
def test_single_key_value_head_in_stages_gradients_match() -> None:
    (verdict,) = run_ranks(in_stages, 4, [one_head("llama")])[0]
    assert verdict.outcome == "right", describe(verdict)


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def llama(corpus: Path, shared_cache: Path, tmp_path: Path) -> dict[str, Any]:
    """One key/value head; attention is that of a run, which multiplies a single head for all query heads."""
    config = tiny_config(corpus, shared_cache, tmp_path / "run")
    return with_values(config, data__validation=[], data__packing="concatenate", model__config__num_key_value_heads=1,
                       training__max_steps=STEPS, training__log_every_steps=1)  # fmt: skip


def test_launch_trains_and_exports_single_key_value_head(llama: dict[str, Any], tmp_path: Path) -> None:
    """Losses, gradient norms and the exported weights are those of one process without any engine; so they are when the
    second half is trained by one process from the checkpoint of the first."""
    ((curve, weights, _),) = run_ranks(train_bare, 1, [(llama, STEPS)])[0]
    half = with_values(llama, parallel__tensor=2, training__max_steps=STEPS // 2)
    for config, world in ((with_values(half, run__seed=11), 2), (llama, 1)):
        (tmp_path / "config.json").write_text(json.dumps(config))
        done = run_command("launch/train.py", "--config", str(tmp_path / "config.json"), world=world)
        assert done.status == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([(row["loss"], row["grad_norm"]) for row in rows], curve, rtol=2e-5)
    exported = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert exported.keys() == weights.keys()
    for name, expected in weights.items():
        np.testing.assert_allclose(exported[name], expected, atol=2e-5, rtol=0, err_msg=name)


# The watch -----------------------------------------------------------------------------------------------------------


def without_sums(config: dict[str, Any], cases: list[str]) -> list[str]:
    """For each case: what the first step says where gradients of weights whose name contains it are summed over no
    ranks."""
    launch = Launch.from_environment()
    summed, said = mapper.sum_gradient, []
    with joined_world(launch, job_topology(config, launch), seed=config["run"]["seed"]) as world:
        for case in cases:
            mapper.sum_gradient = lambda parameter, group, case=case: (
                None if case in shard_of(parameter).name else summed(parameter, group)
            )
            try:
                _train(config, 1, launch, world.topology, world, "")
                said.append("")
            except PlanError as error:
                said.append(str(error.problems[0]))
    return said


@pytest.mark.parametrize(("heads", "cases"), [(1, ["v_proj"]), (2, ["k_proj", "q_norm"])])
def test_first_step_detects_missing_gradient_sum(heads: int, cases: list[str], llama: dict[str, Any]) -> None:
    """One head on two ranks; two heads on four, each on two of them."""
    ranks = 2 * heads
    config = with_values(llama, parallel__tensor=ranks, model__config__num_key_value_heads=heads,
                         model__config__model_type="qwen3", model__config__head_dim=8)  # fmt: skip
    for rank in run_ranks(without_sums, ranks, config, cases):
        for case, message in zip(cases, rank, strict=True):
            holders = ranks if case == "q_norm" else 2
            assert f"{case}.weight is held by {holders} tensor ranks, and its gradients there differ by" in message
