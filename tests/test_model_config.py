"""A model's configuration: its sizes, and keys that could run code."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tools.parity.shrink import tiny as tiny_family
from trainer.config.model_config import parse_model_config, scrub
from trainer.config.model_facts import model_facts
from trainer.config.model_sizes import relation_problems, size_problems
from trainer.errors import ConfigError

pytestmark = pytest.mark.fast


def test_model_config_code_keys_are_dropped_at_every_depth() -> None:
    raw = {
        "model_type": "llama",
        "auto_map": {"AutoModel": "evil.Model"},
        "_attn_implementation_internal": "evil/repo",
        "text_config": {"trust_remote_code": True, "hidden_size": 3},
    }
    assert scrub(raw) == {"model_type": "llama", "text_config": {"hidden_size": 3}}


def sizes_refused(model_type: str, **values: object) -> str:
    with pytest.raises(ConfigError) as raised:
        parse_model_config({"model_type": model_type, **values}, "model.config")
    return str(raised.value)


@pytest.mark.parametrize(
    ("model_type", "values", "expected"),
    [
        ("gpt2", {"n_layer": 0}, "model.config.n_layer: must be a whole number of at least 1 (got 0)"),
        ("gpt2", {"num_hidden_layers": 0}, "model.config.num_hidden_layers: must be a whole number of at least 1"),
        ("dbrx", {"attn_config": {"kv_n_heads": 0}}, "model.config.attn_config.kv_n_heads: must be a whole number"),
        ("gemma3n_text", {"intermediate_size": [64, 0]}, "intermediate_size: must be a whole number of at least 1"),
        ("gemma3", {"text_config": {"hidden_size": 2.5}}, "model.config.text_config.hidden_size: must be a whole"),
        (
            "gemma3",
            {"text_config": {"num_attention_heads": 4, "num_key_value_heads": 3}},
            "model.config.text_config.num_key_value_heads: must divide the 4 attention heads (got 3)",
        ),
        (
            "mistral",
            {"hidden_size": 66, "num_attention_heads": 4, "num_key_value_heads": 2},
            "model.config.hidden_size: must be a multiple of the number of attention heads, 4",
        ),
        ("qwen2_moe", {"num_experts": -1}, "model.config.num_experts: must be a whole number of at least 0 (got -1)"),
        (
            "deepseek_v3",
            {"n_routed_experts": 4, "n_group": 1, "topk_group": 1},
            "num_experts_per_tok: must be between 1 and the number of experts, 4 (got 8)",
        ),
        ("phi3", {"max_position_embeddings": 0}, "max_position_embeddings: must be a whole number of at least 1"),
        ("llama", {"vocab_size": -5}, "model.config.vocab_size: must be a whole number of at least 1 (got -5)"),
    ],
)
def test_impossible_model_size_is_refused(model_type: str, values: dict[str, Any], expected: str) -> None:
    assert expected in sizes_refused(model_type, **values)


@pytest.mark.parametrize(
    ("model_type", "values"),
    [
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 4}),
        ("jamba", {"num_experts": 1}),
        ("qwen2_moe", {"num_experts": 0, "sliding_window": 0, "shared_expert_intermediate_size": 0}),
        ("gemma3n_text", {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}),
        ("granitemoeshared", {"shared_intermediate_size": 0}),
        ("qwen3", {"hidden_size": 66, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8}),
        ("qwen3", {"hidden_size": 66, "num_attention_heads": 4, "num_key_value_heads": 2}),  # its default head_dim
        ("longcat_flash", {"n_routed_experts": 8, "zero_expert_num": 4, "moe_topk": 12}),
        ("llama", {"num_key_value_heads": None, "pad_token_id": -1}),
    ],
)
def test_unusual_model_size_is_accepted(model_type: str, values: dict[str, Any]) -> None:
    parse_model_config({"model_type": model_type, **values}, "model.config")


def test_default_sizes_of_every_family_are_accepted() -> None:
    """Check the defaults of each family, written as in a model folder."""
    count = 0
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[model_type]()
        except Exception:  # a family without defaults
            continue
        count += 1
        for raw in (config.to_dict(), config.to_diff_dict()):
            problems = [*size_problems(raw, model_type), *relation_problems(config, raw, model_type)]
            assert not problems, problems
    assert count > 150


def test_per_layer_attention_heads_use_common_divisor() -> None:
    """Return the common divisor: 16 heads in two layers, 8 in the others."""
    assert model_facts(tiny_family("dots3_note_text")).attention_heads == 8
    assert model_facts(tiny_family("llama")).attention_heads == 8
    assert model_facts(tiny_family("mamba")).attention_heads is None
