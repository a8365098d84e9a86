"""Every gradient of families sharded over tensor ranks, against Hugging Face's model; negative controls."""

from __future__ import annotations

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.harness import run_ranks
from tools.parity import matrix, training_proof
from tools.parity.families import FAMILIES, Family, Task
from tools.parity.gradient_proof import Verdict, prove, prove_causality
from tools.parity.layout import parse_layout
from tools.parity.matrix import Column
from tools.parity.results import Results
from tools.parity.training_proof import prove_training, tiny_model
from tools.parity.variations import FEW_HEADS, GENERIC, HEADS, OPPOSITE, UNEVEN, WIDTH, variations
from trainer.config.causal_attention import NON_CAUSAL_FAMILIES
from trainer.tensor_parallel import TensorMapper, collectives, layers
from trainer.tensor_parallel.families import FAMILIES as PLANS
from trainer.tensor_parallel.families import VARIANTS

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
"""Each arrangement of attention, experts and recurrences at least once."""

COUNTED = {Column(2): (180, 55), Column(pipeline=2): (173, 53), Column(2, 2): (173, 53)}
"""Minimum number of causal language models, and of others, that are right."""


def prove_in_float64(families: list[Family]) -> list[Verdict]:
    return prove(families, dtype=torch.float64)


def prove_with_sequence_parallel(families: list[Family]) -> list[Verdict]:
    return prove(families, sequence_parallel=True)


def describe(verdict: Verdict) -> str:
    return f"{verdict.family}: {verdict.outcome} {verdict.reason}; worst {verdict.worst_name} {verdict.worst}"


@pytest.mark.parametrize("ranks", [2, 4])
def test_family_gradients_match(ranks: int) -> None:
    families = [f for f in REPRESENTATIVE if ranks == 2 or f.model_type != "codegen"]  # four blocks of two heads
    verdicts = run_ranks(prove, ranks, families)[0]
    assert [describe(v) for v in verdicts if v.outcome != "right"] == []


def test_family_gradients_match_in_float64() -> None:
    """Only families that compute nothing in float32 explicitly."""
    names = ("gpt2", "opt", "bloom", "gpt_neox", "codegen", "falcon", "bert", "bart")
    verdicts = run_ranks(prove_in_float64, 2, [f for f in REPRESENTATIVE if f.model_type in names])[0]
    assert [describe(v) for v in verdicts if not v.worst <= 1e-9 or v.outcome != "right"] == []


def test_family_gradients_match_with_sequence_parallel() -> None:
    model_types = (
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
    verdicts = run_ranks(prove_with_sequence_parallel, 2, [f for f in REPRESENTATIVE if f.model_type in model_types])[0]
    assert [describe(v) for v in verdicts if v.outcome != "right"] == []


def test_four_key_value_heads_on_eight_ranks_gradients_match() -> None:
    verdicts = run_ranks(prove, 8, [Family("llama"), Family("qwen3"), Family("falcon"), Family("gpt_bigcode")])[0]
    assert [describe(v) for v in verdicts if v.outcome != "right"] == []


def skip_input_reduction(families: list[Family]) -> list[Verdict]:
    """Change gradients only: the loss stays exact."""
    collectives.enter_region = lambda x, group: x
    return prove(families)


def skip_output_reduction(families: list[Family]) -> list[Verdict]:
    collectives.reduce_from_region = lambda x, group: x
    return prove(families)


def add_bias_twice(families: list[Family]) -> list[Verdict]:
    plain = layers._RowLinear.forward
    layers._RowLinear.forward = lambda self, x: plain(self, x) + self.bias  # type: ignore[method-assign]
    return prove(families)


def skip_gradient_sums(families: list[Family]) -> list[Verdict]:
    from trainer.tensor_parallel import mapper

    mapper.sum_gradient = lambda parameter, group: None
    return prove(families)


def shard_fused_weight_as_one(families: list[Family]) -> list[Verdict]:
    return prove(families, {"h.*.attn.c_attn": "colwise:head_dim"})


def replicate_norms_without_sum(families: list[Family]) -> list[Verdict]:
    return prove(families, {"layers.*.self_attn.q_norm": "replicate:a test"})


def scale_gradient(value: float, name: str) -> None:
    """Scale the gradient of the first parameter with a shard of the weight of module `name`, after its sum."""
    install = TensorMapper.install

    def installed(self: TensorMapper) -> None:
        install(self)
        parameters = dict(self._model.get_submodule(name).named_parameters(recurse=False))
        parameters["weight"].register_hook(lambda gradient: gradient * value)

    TensorMapper.install = installed  # type: ignore[method-assign]


def make_gradient_nan(families: list[Family]) -> list[Verdict]:
    scale_gradient(float("nan"), "model.layers.1.mlp.down_proj")
    return prove(families)


def triple_gradient_of_first_shard(families: list[Family]) -> list[Verdict]:
    """Falcon's fused q|k|v is in two parameters: the queries, and the key and value that ranks share."""
    scale_gradient(3.0, "transformer.h.1.self_attention.query_key_value")
    return prove(families)


@pytest.mark.parametrize(
    ("sabotage", "model_type", "loss_differs"),
    [
        (skip_input_reduction, "llama", False),
        (skip_output_reduction, "llama", True),
        (add_bias_twice, "opt", True),
        (skip_gradient_sums, "qwen3", False),
        (shard_fused_weight_as_one, "gpt2", True),
        (replicate_norms_without_sum, "qwen3", False),
        (make_gradient_nan, "llama", False),
        (triple_gradient_of_first_shard, "falcon", False),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_layout_comparison_detects_sabotage(sabotage: object, model_type: str, loss_differs: bool) -> None:
    (verdict,) = run_ranks(sabotage, 2, [Family(model_type)])[0]  # type: ignore[arg-type]
    assert verdict.outcome == "wrong"
    plain, sharded = verdict.loss
    assert (abs(plain - sharded) > 1e-4 * plain) == loss_differs


@pytest.mark.fast
def test_every_plan_belongs_to_a_listed_family() -> None:
    known = {family.model_type for family in FAMILIES}
    parts = {part for model_type in known for part in getattr(CONFIG_MAPPING[model_type], "sub_configs", {}).values()}
    known |= {part.model_type for part in parts if hasattr(part, "model_type")}
    planned = {*PLANS, *(variant.model_type for variant in VARIANTS)}
    assert planned - known == set(), "plans without a row in tools/parity/families.py"


def family_of_shape(model_type: str, shape: str, task: Task = "causal_lm") -> Family:
    """Return a family in one of its shapes."""
    return next(variation.family for variation in variations(Family(model_type, task)) if variation.shape == shape)


SHAPED = [
    ("llama", HEADS),
    ("gemma3_text", HEADS),
    ("qwen2", HEADS),
    ("qwen3", WIDTH),
    ("gpt_oss", UNEVEN),
    ("mixtral", UNEVEN),
    ("deepseek_v3", UNEVEN),
    ("gpt2", OPPOSITE),
    ("starcoder2", OPPOSITE),
    ("cohere", "flip use_qk_norm=True"),
    ("stablelm", "flip qk_layernorm=True"),
    ("falcon", "flip bias=True"),
]
"""Arrangements that the generic shape does not have, each at least once."""


def prove_any_shape(families: list[Family]) -> list[Verdict]:
    return prove(families, like_default=False)


def test_family_gradients_match_in_other_shapes() -> None:
    families = [*(family_of_shape(*pair) for pair in SHAPED), family_of_shape("bart", UNEVEN, "seq2seq_lm")]
    verdicts = run_ranks(prove_any_shape, 2, families)[0]
    assert [describe(v) for v in verdicts if v.outcome != "right"] == []


def test_shared_heads_on_more_ranks_than_heads_gradients_match() -> None:
    families = [
        family_of_shape("llama", HEADS),
        family_of_shape("llama", FEW_HEADS),
        family_of_shape("olmo2", FEW_HEADS),
    ]
    verdicts = run_ranks(prove_any_shape, 4, families)[0]
    assert [describe(v) for v in verdicts if v.outcome != "right"] == []


@pytest.mark.fast
def test_shapes_match_their_names() -> None:
    llama = {variation.shape: variation.changed for variation in variations(Family("llama"))}
    assert llama == {
        GENERIC: (),
        HEADS: ("num_key_value_heads=1",),
        FEW_HEADS: ("num_key_value_heads=2",),
        WIDTH: ("head_dim=16",),
        UNEVEN: ("intermediate_size=124", "vocab_size=257"),
        OPPOSITE: ("tie_word_embeddings=True", "attention_bias=True", "mlp_bias=True"),
        "flip attention_bias=True": ("attention_bias=True",),
        "flip mlp_bias=True": ("mlp_bias=True",),
    }


@pytest.mark.fast
def test_shapes_with_differing_layers_gradients_match() -> None:
    """Gemma 4 refuses to return one number for all layers."""
    assert UNEVEN in {variation.shape for variation in variations(Family("gemma4_text"))}


@pytest.mark.parametrize(("model_type", "layouts"), [("gemma4_text", ("tensor=2", "pipeline=2"))])
def test_launch_trains_family(model_type: str, layouts: tuple[str, str]) -> None:
    verdict = prove_training(model_type, tiny_model(Family(model_type)), [*map(parse_layout, layouts)])
    assert verdict.outcome == "right", describe(verdict)


def compare_with_larger_rate(family: str, path: str) -> Verdict:
    training_proof.RATE *= 1.01
    return training_proof.compare(family, path)


def test_differing_training_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the bare loop uses a larger learning rate than the command."""
    monkeypatch.setattr(training_proof, "compare", compare_with_larger_rate)
    verdict = prove_training("llama", tiny_model(Family("llama")), [parse_layout("data=1")])
    assert (verdict.outcome, "differs from the reference" in verdict.reason) == ("wrong", True), describe(verdict)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("model_type", "outcome"),
    [("llama", "right"), ("bert", "right"), ("xlnet", "wrong"), ("prophetnet", "wrong"), ("cpmant", "wrong")],
)
def test_family_causality_matches_expectation(model_type: str, outcome: str) -> None:
    """Families that see later tokens are refused by name; the matrix looks for others."""
    verdict = prove_causality(Family(model_type))
    assert verdict.outcome == outcome, describe(verdict)
    assert (model_type in NON_CAUSAL_FAMILIES) == (outcome == "wrong")


@pytest.mark.matrix
def test_all_families_are_proven() -> None:
    """Resume after an interruption: verdicts are kept as long as the sources stay the same."""
    rows = matrix.run(["all"], matrix.PAGES_COLUMNS, Results(), shapes=True, training=True)
    assert [describe(v) for row in rows for v in row.verdicts if v.outcome in matrix.BAD] == []
    causal = [row for row in rows if row.family.task == "causal_lm"]
    others = [row for row in rows if row.family.task != "causal_lm"]
    for column, (causal_count, other_count) in COUNTED.items():
        assert sum(row.outcome(column) == "right" for row in causal) >= causal_count, str(column)
        assert sum(row.outcome(column) == "right" for row in others) >= other_count, str(column)
