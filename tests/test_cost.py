"""Parameters and FLOPs of every family, against arithmetic on its tiny configuration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tools.parity.shrink import tiny
from trainer.model import model_cost

HEAD = 12 * 8
"""FLOPs of a head of 8 numbers for a query and a key: 2 for each multiplication, 2 products, forward and twice back."""

LAYER = 8 * HEAD
"""Of an attention layer with the usual 8 heads of 8 numbers; most families have 4 such layers when they are tiny."""

LATENT = 6 * 8 * (8 + 8 + 8)
"""Multi-head latent attention: queries and keys of 8 + 8 numbers, values of 8."""

INDEXER = 6 * 2 * 8 + 6 * 2
"""A sparse indexer: scores of 2 heads of 8 numbers, and their weighted sum; it has no values."""

ATTENTION: dict[str, int] = {
    "axk1": 4 * LATENT, "axk2": 4 * (LATENT + INDEXER), "bailing_hybrid": 2 * LATENT, "bamba": 0, "bart": 2 * LAYER,
    "bigbird_pegasus": 2 * LAYER, "blenderbot": 2 * LAYER, "blenderbot-small": 2 * LAYER,
    "deepseek_v2": 4 * LATENT, "deepseek_v3": 4 * LATENT, "deepseek_v32": 4 * (LATENT + INDEXER),
    "diffllama": 4 * 2 * LAYER, "dots3_note_text": 2 * (6 * 8 * (24 + 8)) + 2 * (6 * 16 * (16 + 8) + INDEXER),
    "falcon_mamba": 0,
    "gemma4": 12 * 8 * (256 + 256 + 16 + 16), "gemma4_text": 12 * 8 * (256 + 256 + 16 + 16),
    "gemma4_unified": 12 * 8 * (256 + 256 + 16 + 16), "gemma4_unified_text": 12 * 8 * (256 + 256 + 16 + 16),
    "glm4_moe_lite": 4 * LATENT, "glm_moe_dsa": 4 * (LATENT + INDEXER), "granitemoehybrid": 0,
    "hrm_text": 4 * 6 * LAYER + 4 * 2 * LAYER, "hy_v4": 4 * LATENT + 2 * INDEXER,
    "inkling2_text": 2 * 2 * LAYER + 2 * LAYER, "inkling_text": 2 * 2 * LAYER + 2 * LAYER, "jamba": LAYER,
    "kimi_linear": 2 * LATENT, "lfm2": 2 * LAYER, "lfm2_moe": 2 * LAYER, "lfm3": 2 * LAYER,
    "longcat_flash": 4 * LATENT, "mamba": 0, "mamba2": 0, "marian": 2 * LAYER, "mbart": 2 * LAYER,
    "mimo_v2_flash": 4 * 6 * 8 * (8 + 4), "minicpm3": 4 * LATENT, "minimax": 2 * LAYER, "mllama": 3 * LAYER,
    "mvp": 2 * LAYER, "nemotron_h": LAYER, "olmo_hybrid": 2 * LAYER, "pegasus": 2 * LAYER, "plbart": 2 * LAYER,
    "qwen3_5": 2 * LAYER, "qwen3_5_moe": 2 * LAYER, "qwen3_5_moe_text": 2 * LAYER, "qwen3_5_text": 2 * LAYER,
    "qwen3_next": 2 * LAYER, "qwen4_exp": 2 * LAYER, "qwen4_exp_text": 2 * LAYER, "recurrent_gemma": LAYER,
    "rwkv": 0, "whisper": 2 * LAYER, "xlstm": 0, "youtu": 4 * LATENT, "zamba": 2 * LAYER, "zamba2": 2 * 2 * LAYER,
}  # fmt: skip
"""Families whose layers are not 4 times 8 heads of 8 numbers."""

APPROXIMATE = ("blt", "deepseek_v4", "prophetnet")
"""Attention to, or among, other numbers of positions than the sequence has tokens."""


def meta(model_type: str, **fields: Any) -> PreTrainedModel:
    config = tiny(model_type, **fields)
    config.use_cache = False
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def check(model_type: str) -> None:
    try:
        model = meta(model_type)
    except Exception as refusal:  # the families' constructors raise what they like
        pytest.skip(f"transformers cannot build it: {refusal}")
    before = model.training, model.config._attn_implementation
    cost = model_cost(model)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert cost.active_matrix_parameters > 0
    if model_type in APPROXIMATE:
        assert cost.attention_flops_per_position > 4 * LAYER
    else:
        assert cost.attention_flops_per_position == ATTENTION.get(model_type, 4 * LAYER)
    assert (model.training, model.config._attn_implementation) == before


SAMPLE = ("blt", "deepseek_v32", "dots3_note_text", "gemma4_text", "gpt2", "jamba", "llama4_text", "mllama", "zamba2")


@pytest.mark.fast
@pytest.mark.parametrize("model_type", SAMPLE)
def test_model_cost_of_representative_families(model_type: str) -> None:
    check(model_type)


@pytest.mark.matrix
@pytest.mark.parametrize("model_type", sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(SAMPLE)))
def test_model_cost_of_every_family(model_type: str) -> None:
    check(model_type)


@pytest.mark.fast
def test_model_cost_counts_executed_modules_only() -> None:
    """An image encoder without images, cross-attention without states to attend to: nothing. A cycle: every time."""
    text = model_cost(meta("gemma3_text")).active_matrix_parameters
    assert model_cost(meta("gemma3")).active_matrix_parameters == text
    layer = 4 * 64 * 64 + 2 * 64 * 128
    assert model_cost(meta("bart")).active_matrix_parameters == 2 * layer + 256 * 64
    cycles = meta("hrm_text")
    matrices = {
        name: sum(p.numel() for p in cycles.get_submodule(f"model.{name}").parameters() if p.dim() == 2)
        for name in ("L_module", "H_module")
    }
    expected = 6 * matrices["L_module"] + 2 * matrices["H_module"] + 256 * 64
    assert model_cost(cycles).active_matrix_parameters == expected


@pytest.mark.fast
@pytest.mark.parametrize("model_type", ["dbrx", "granitemoe", "hunyuan_v1_moe", "mixtral", "qwen3_moe"])
def test_model_cost_counts_active_experts(model_type: str) -> None:
    """2 of 4 experts, whatever the family calls them, in one field or one for each layer."""
    model = meta(model_type)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n or "_linear.weight" in n)
    embedding = model.get_input_embeddings().weight
    everything = sum(p.numel() for p in model.parameters() if p.dim() > 1 and p is not embedding)
    tied = 256 * 64 if model.config.tie_word_embeddings else 0
    assert experts > 0
    assert model_cost(model).active_matrix_parameters == everything + tied - experts // 2


@pytest.mark.fast
def test_model_cost_without_trace_equals_traced_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules and their attributes give the same for layers that are alike."""
    models = [meta(model_type) for model_type in ("llama", "gpt2", "bert", "bloom", "cpmant", "xlnet")]
    traced = [model_cost(model) for model in models]
    monkeypatch.setattr("trainer.model.cost._trace", lambda model, length: None)
    assert [model_cost(model) for model in models] == traced
