"""Every gradient of families cut over tensor ranks, against a plain Hugging Face model; and breaks that must show."""

from __future__ import annotations

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.harness import run_ranks
from tools.parity.families import FAMILIES, Family
from tools.parity.matrix import Column, prove_all
from tools.parity.proof import Verdict, prove
from trainer.parallel import collectives, layers
from trainer.parallel.families import FAMILIES as PLANS

REPRESENTATIVE = [
    Family("llama"),
    Family("qwen3"),
    Family("olmo2"),
    Family("gemma2"),
    Family("phi3"),
    Family("gpt2"),
    Family("opt"),
    Family("bloom"),
    Family("mpt"),
    Family("gptj"),
    Family("gpt_neox"),
    Family("codegen"),
    Family("cohere"),
    Family("falcon"),
    *(family for family in FAMILIES if family.model_type == "falcon" and family.variant),
    Family("gpt_bigcode"),
    Family("mixtral"),
    Family("gpt_oss"),
    Family("qwen2_moe"),
    Family("deepseek_v3"),
    Family("mamba2"),
    Family("qwen3_next"),
    Family("jamba"),
    Family("bert", "masked_lm"),
    Family("deberta-v2", "masked_lm"),
    Family("t5", "seq2seq_lm"),
    Family("bart", "seq2seq_lm"),
]
"""What attention, experts and recurrences there are, each at least once."""

COUNTED = {"causal_lm": 140, "built": 150, "others": 25, "pipeline": 130, "hybrid": 120}
"""At least so many families are right."""


def in_float64(families: list[Family]) -> list[Verdict]:
    return prove(families, dtype=torch.float64)


def in_sequence_parallel(families: list[Family]) -> list[Verdict]:
    return prove(families, sequence_parallel=True)


def describe(verdict: Verdict) -> str:
    return f"{verdict.family}: {verdict.outcome} {verdict.reason}; worst {verdict.worst_name} {verdict.worst}"


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_gradient(ranks: int) -> None:
    families = [f for f in REPRESENTATIVE if ranks == 2 or f.model_type != "codegen"]  # four blocks of two heads
    found = run_ranks(prove, ranks, families)[0]
    assert [describe(v) for v in found if v.outcome != "right"] == []


def test_every_gradient_in_float64() -> None:
    """Of families that compute nothing in float32 by themselves."""
    names = ("gpt2", "opt", "bloom", "gpt_neox", "codegen", "falcon", "bert", "bart")
    found = run_ranks(in_float64, 2, [f for f in REPRESENTATIVE if f.model_type in names])[0]
    assert [describe(v) for v in found if not v.worst <= 1e-9 or v.outcome != "right"] == []


def test_every_gradient_with_the_sequence_cut() -> None:
    kinds = (
        "llama",
        "qwen3",
        "olmo2",
        "gpt2",
        "opt",
        "bloom",
        "gpt_neox",
        "falcon",
        "mixtral",
        "deepseek_v3",
        "mamba2",
        "bart",
    )
    found = run_ranks(in_sequence_parallel, 2, [f for f in REPRESENTATIVE if f.model_type in kinds])[0]
    assert [describe(v) for v in found if v.outcome != "right"] == []


def test_four_key_value_heads_on_eight_ranks() -> None:
    found = run_ranks(prove, 8, [Family("llama"), Family("qwen3"), Family("falcon"), Family("gpt_bigcode")])[0]
    assert [describe(v) for v in found if v.outcome != "right"] == []


def no_reduction_of_inputs(families: list[Family]) -> list[Verdict]:
    """The loss stays exact: only gradients tell."""
    collectives.enter = lambda x, group: x
    return prove(families)


def no_sum_of_outputs(families: list[Family]) -> list[Verdict]:
    collectives.leave = lambda x, group: x
    return prove(families)


def bias_added_twice(families: list[Family]) -> list[Verdict]:
    plain = layers._RowLinear.forward
    layers._RowLinear.forward = lambda self, x: plain(self, x) + self.bias  # type: ignore[method-assign]
    return prove(families)


def no_sum_of_shared_gradients(families: list[Family]) -> list[Verdict]:
    from trainer.parallel import mapper

    mapper.sum_gradient = lambda parameter, group: None
    return prove(families)


def wrong_arrangement(families: list[Family]) -> list[Verdict]:
    return prove(families, {"h.*.attn.c_attn": "colwise:head_dim"})


def norms_left_whole(families: list[Family]) -> list[Verdict]:
    return prove(families, {"layers.*.self_attn.q_norm": "replicate:a test"})


@pytest.mark.parametrize(
    ("sabotage", "model_type", "loss_tells"),
    [
        (no_reduction_of_inputs, "llama", False),
        (no_sum_of_outputs, "llama", True),
        (bias_added_twice, "opt", True),
        (no_sum_of_shared_gradients, "qwen3", False),
        (wrong_arrangement, "gpt2", True),
        (norms_left_whole, "qwen3", False),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_sabotage_is_noticed(sabotage: object, model_type: str, loss_tells: bool) -> None:
    (verdict,) = run_ranks(sabotage, 2, [Family(model_type)])[0]  # type: ignore[arg-type]
    assert verdict.outcome == "wrong"
    plain, cut = verdict.loss
    assert (abs(plain - cut) > 1e-4 * plain) == loss_tells


@pytest.mark.fast
def test_every_plan_belongs_to_a_family_of_the_table() -> None:
    known = {family.model_type for family in FAMILIES}
    parts = {part for model_type in known for part in getattr(CONFIG_MAPPING[model_type], "sub_configs", {}).values()}
    known |= {part.model_type for part in parts if hasattr(part, "model_type")}
    strangers = {key.partition("?")[0] for key in PLANS} - known
    assert not strangers, f"{sorted(strangers)}: a plan without a row in tools/parity/families.py"


@pytest.mark.matrix
def test_the_whole_population() -> None:
    found = [run_ranks(prove, 2, [family])[0][0] for family in FAMILIES]
    assert [describe(v) for v in found if v.outcome == "wrong"] == []
    causal = [v for family, v in zip(FAMILIES, found, strict=True) if family.task == "causal_lm" and not family.variant]
    others = {
        f.model_type for f, v in zip(FAMILIES, found, strict=True) if f.task != "causal_lm" and v.outcome == "right"
    }
    assert sum(v.outcome != "not built" for v in causal) >= COUNTED["built"]
    assert sum(v.outcome == "right" for v in causal) >= COUNTED["causal_lm"]
    assert len(others) >= COUNTED["others"]


@pytest.mark.matrix
@pytest.mark.parametrize(("column", "count"), [(Column(pipeline=2), "pipeline"), (Column(2, 2), "hybrid")], ids=str)
def test_the_whole_population_in_stages(column: Column, count: str) -> None:
    rows = list(prove_all(FAMILIES, [column]))
    found = [row.found[column] for row in rows]
    assert [describe(v) for v in found if v.outcome in ("wrong", "failed")] == []
    causal = [row.found[column] for row in rows if row.family.task == "causal_lm" and not row.family.variant]
    assert sum(v.outcome == "right" for v in causal) >= COUNTED[count]
