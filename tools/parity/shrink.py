"""Tiny models: a family's own configuration with small sizes and every type of layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SIZES: dict[str, Any] = {
    "hidden_size": 64, "d_model": 64, "n_embd": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8,
    "num_hidden_layers": 4, "vocab_size": 256, "intermediate_size": 128, "max_position_embeddings": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "moe_topk": 2,
    "expert_ffn_hidden_size": 32, "ffn_hidden_size": 128,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 8, "decoder_attention_heads": 8,
    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "ffn_dim": 128,
    "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""The generic shrink: sizes by the names that configurations share. A field that is None is not changed."""

_MROPE = {"rope_type": "default", "rope_theta": 10000.0}
_KDA = {"linear_head_dim": 8, "linear_num_heads": 8, "num_experts_per_token": 2, "num_expert_group": 1}
_INKLING = {
    "swa_num_attention_heads": 8,
    "swa_num_key_value_heads": 4,
    "num_key_value_heads": 2,
    "swa_head_dim": 16,
    "sliding_window_size": 8,
    "rel_extent": 16,
    "d_rel": 4,
}
_DSA = {"q_lora_rank": 8, "kv_lora_rank": 8, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 8}

_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 8}

COUPLED: dict[str, dict[str, Any]] = {
    "axk1": {"q_lora_rank": 8, "kv_lora_rank": 8},
    "axk2": {**_DSA, "gated_norm_rank": 1},
    "bailing_hybrid": {**_KDA, "first_k_dense_replace": 1, "layer_group_size": 2,
                       "layer_types": ["linear_attention", "full_attention"] * 2,
                       "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 50,
            "patcher_config": {"num_hidden_layers": 1, "intermediate_size": 16, "hidden_size": 16, "head_dim": 2},
            "encoder_config": {"num_hidden_layers": 1, "hidden_size_global": 128},
            "decoder_config": {"hidden_size_global": 128},
            "global_config": {"hidden_size": 128, "head_dim": 16}},
    "bamba": _MAMBA2,
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _MROPE, "sliding_attention": _MROPE},
                            "layer_types": ["sliding_attention", "full_attention"] * 2},
    "convbert": {"embedding_size": 64},
    "cpmant": {"dim_head": 8, "dim_ff": 128, "init_std": 0.02},
    "ctrl": {"dff": 128},
    "dbrx": {"attn_config": {"kv_n_heads": 4, "clip_qkv": 8.0, "rope_theta": 10000.0},
             "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2}},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "deepseek_v3": {"q_lora_rank": 8, "kv_lora_rank": 8},
    "deepseek_v32": {**_DSA},
    "deepseek_v4": {"index_n_heads": 4, "index_head_dim": 16, "index_topk": 8, "o_groups": 4, "o_lora_rank": 8,
                    "hc_mult": 2, "head_dim": 16, "partial_rotary_factor": 0.5, "num_key_value_heads": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "dots3_note_text": {**_DSA, "num_attention_heads": 16, "num_key_value_heads": 16, "qk_nope_head_dim": 8,
                        "head_dim": 16, "shared_experts_intermediate_size": 32,
                        "per_layer_config": {n: {"num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 8,
                                                 "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
                                                 "v_head_dim": 8, "head_dim": 24} for n in (2, 3)}},
    "esm": {"vocab_size": 256, "pad_token_id": 0, "mask_token_id": 3},
    "falcon": {"num_kv_heads": 1},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 128},
    "gemma3n_text": {"intermediate_size": [128] * 4, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
                     "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
                     "vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 16, "laurel_rank": 8},
    "gemma4_text": {"vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 16,
                    "per_layer_config": {2: {"head_dim": 16}, 3: {"head_dim": 16}}},
    "gemma4_unified_text": {"per_layer_config": {2: {"head_dim": 16}, 3: {"head_dim": 16}}},
    "glm4_moe_lite": {"q_lora_rank": 8, "kv_lora_rank": 8},
    "glm_moe_dsa": {**_DSA},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**_MAMBA2, "shared_intermediate_size": 128},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": [2] * 4},
    "hy_v4": {**_DSA, "hc_mult": 2},
    "inkling2_text": _INKLING,
    "inkling_text": _INKLING,
    "jamba": {"num_hidden_layers": 8, "mamba_dt_rank": 4},
    "kimi_linear": {**_KDA, "layer_types": ["linear_attention", "full_attention"] * 2,
                    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"q_lora_rank": 8, "kv_lora_rank": 8, "num_layers": 2, "zero_expert_num": 2},
    "mamba2": {"head_dim": 16, "num_heads": 8, "state_size": 16, "n_groups": 2, "chunk_size": 8},
    "mimo_v2_flash": {"v_head_dim": 4},
    "minicpm3": {"q_lora_rank": 8, "kv_lora_rank": 8},
    "minimax_m3_vl_text": {"shared_intermediate_size": 32, "dense_intermediate_size": 128,
                           "index_n_heads": 4, "index_head_dim": 8, "index_block_size": 4, "index_topk_blocks": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 4},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 8,
                   "moe_shared_expert_intermediate_size": 32},
    "qwen4_exp_text": {"rope_parameters": {**_MROPE, "partial_rotary_factor": 0.5}, "indexer_n_heads": 4,
                       "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
                       "indexer_compress_ratio": 4, "hc_count": 2, "hc_lowrank": 4},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [4, 6],
                 "feed_forward_size": 128, "attention_head_size": 8, "local_attn_chunk_length": 4,
                 "lsh_attn_chunk_length": 4, "num_buckets": 4, "attn_layers": ["local", "lsh", "local", "lsh"],
                 "hash_seed": 7},
    "roc_bert": {"pronunciation_embed_dim": 64, "shape_embed_dim": 64, "pronunciation_vocab_size": 64,
                 "shape_vocab_size": 64},
    "xlnet": {"d_model": 64, "n_layer": 4, "n_head": 8, "d_inner": 128, "d_head": 8},
    "xmod": {"default_language": "en_XX"},
    "youtu": {"q_lora_rank": 8, "kv_lora_rank": 8},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "zamba": {"num_hidden_layers": 6, "attention_hidden_size": 128, "attention_head_dim": 16, "mamba_dt_rank": 4,
              "num_key_value_heads": 8,
              "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention",
                                    "hybrid", "linear_attention"]},
    "zamba2": {"num_hidden_layers": 6, "attention_hidden_size": 128, "attention_head_dim": 16, "mamba_d_state": 16,
               "mamba_headdim": 16, "n_mamba_heads": 8, "chunk_size": 8, "adapter_rank": 8, "num_key_value_heads": 8,
               "num_query_groups": 8, "kv_channels": 8,
               "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "linear_attention",
                                     "hybrid", "linear_attention"], "hybrid_layer_ids": [1, 4]},
}  # fmt: skip
"""Fields that a family needs set together, in addition to or instead of the generic ones."""


MINIMAL: dict[str, dict[str, Any]] = {
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "dbrx": {"attn_config": {"kv_n_heads": 8, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "deepseek_v2": {"num_experts_per_tok": 6, "n_group": 8, "topk_group": 3},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 2048,
        "indexer_compress_ratio": 4,
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": _MROPE, "sliding_attention": _MROPE}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 48},
    "reformer": {"is_decoder": True},
}
"""Fields that a family's default configuration lacks and its model requires."""


def _small(config: PreTrainedConfig, coupled: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in SIZES.items():
        try:
            if getattr(config, key, None) is None:
                continue
        except Exception:  # some families refuse to read it
            continue
        if key in coupled and coupled[key] is None:
            continue
        if key.endswith("_token_id") and not isinstance(getattr(config, key), int):
            continue
        if any(isinstance(vars(base).get(key), property) for base in type(config).__mro__):
            continue
        fields[key] = value
    if "num_key_value_heads" in fields:  # as many as heads where the family has as many
        heads = getattr(config, "num_attention_heads", None)
        fields["num_key_value_heads"] = {heads: 8, 1: 1}.get(config.num_key_value_heads, 4)
    for key in ("layer_types", "mlp_layer_types"):
        if isinstance(getattr(type(config), key, None), property) or key in config.attribute_map:
            continue
        if isinstance(getattr(config, key, None), list) and getattr(config, "num_hidden_layers", 0) > 4:
            fields[key] = _few(getattr(config, key), fields.get("num_hidden_layers", 4))
    return fields


def _few(kinds: list[str], count: int) -> list[str]:
    """Return `count` layers among which every type occurs, in the order of their first occurrence."""
    distinct = list(dict.fromkeys(kinds))
    return [distinct[n * len(distinct) // count] for n in range(count)] if len(distinct) <= count else kinds[:count]


def tiny(model_type: str, **variant: Any) -> PreTrainedConfig:
    """Return the family's default configuration made small; `variant` overrides single fields."""
    cls = CONFIG_MAPPING[model_type]
    coupled = COUPLED.get(model_type, {}) | variant
    default = cls()
    fields: dict[str, Any] = _small(default, coupled)
    for name in getattr(cls, "sub_configs", {}):
        sub = getattr(default, name, None)
        if isinstance(sub, PreTrainedConfig):
            sub_type = getattr(sub, "model_type", "")
            fields[name] = {
                **sub.to_dict(),
                **_small(sub, COUPLED.get(sub_type, {})),
                **COUPLED.get(sub_type, {}),
                **coupled.get(name, {}),
            }
    return cls(
        **(fields | {key: value for key, value in coupled.items() if key not in getattr(cls, "sub_configs", {})})
    )


def shrunk(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield a user's configuration made small in several ways, the most faithful first.

    What determines the structure (attention, norms, types of layers, ties) stays; sizes shrink. The caller takes the
    first that can be built.

    Raises: ValueError, TypeError and other types of a family's constructor: while iterating, if none fits.
    """
    cls = type(config)
    error: Exception | None = None
    for whole_rows in (False, True):
        for base in (config.to_diff_dict, config.to_dict):
            try:
                fields = base() | _overrides(config, whole_rows)
                for name in getattr(cls, "sub_configs", {}):
                    sub = getattr(config, name, None)
                    if isinstance(sub, PreTrainedConfig):
                        row = COUPLED.get(config.model_type, {}).get(name, {})
                        fields[name] = sub.to_dict() | _overrides(sub, whole_rows) | row
                small = cls.from_dict(fields)
            except Exception as refusal:  # the families' own validators raise many types
                error = refusal
                continue
            yield small
    if error is not None:
        raise error


def _overrides(config: PreTrainedConfig, whole_rows: bool) -> dict[str, Any]:
    """Return the small sizes for `config`, by the names that its constructor takes.

    Args:
        config: Configuration of the user.
        whole_rows: Whether to use all fields of the family's row of `COUPLED`, not only sizes.
    """
    row = dict(COUPLED.get(config.model_type, {}))
    fields = _small(config, row)
    for key in [key for key in row if key in getattr(type(config), "sub_configs", {})]:
        del row[key]
    if not whole_rows:
        row = {key: value for key, value in row.items() if _is_size(value)}
        heads = getattr(config, "num_attention_heads", None)
        for key in ("num_kv_heads", "num_key_value_heads"):  # the user's sharing of heads, not the default's
            if key in row and getattr(config, key, None) is not None:
                row[key] = {heads: 8, 1: 1}.get(getattr(config, key), 4)
    fields |= row
    _fewer_layers(config, fields, keep=row if whole_rows else {})
    for key in ("word_embed_proj_dim", "embedding_size"):  # projected where it is not the hidden size
        if isinstance(size := getattr(config, key, None), int):
            fields[key] = 64 if size == getattr(config, "hidden_size", None) else 32
    parts = [fields.get("qk_nope_head_dim"), fields.get("qk_rope_head_dim")]
    if isinstance(getattr(config, "qk_head_dim", None), int) and None not in parts:
        fields["qk_head_dim"] = sum(parts)
    half = _rotated(config, fields) // 2
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(value := getattr(config, key, None), dict) and key not in row:
            fields[key] = _small_rope(value, half)
    return {config.attribute_map.get(key, key): value for key, value in fields.items()}


def _fewer_layers(config: PreTrainedConfig, fields: dict[str, Any], keep: dict[str, Any]) -> None:
    """Reduce the number of layers, and lists with an entry for each layer, except for those in `keep`."""
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int):
        return
    count = min(layers, fields.get("num_hidden_layers", layers))
    if "num_hidden_layers" in fields:
        fields["num_hidden_layers"] = count
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == layers and key not in keep:
            fields[key] = _few(value, count) if isinstance(value[0], str) else fields.get(key, value)[:count]


def _is_size(value: Any) -> bool:
    """Return whether an entry of `COUPLED` contains only sizes."""
    if isinstance(value, dict):
        return not any(isinstance(inner, str | bool) for inner in value.values())
    if isinstance(value, list):
        return not any(isinstance(inner, str | list) for inner in value)
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _rotated(config: PreTrainedConfig, fields: dict[str, Any]) -> int:
    """Return the number of rotated elements of a head in the small model's rotary embedding."""
    size = fields.get("qk_rope_head_dim") or fields.get("head_dim") or 8
    rope = getattr(config, "rope_parameters", None) or {}
    share = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    return int(size * share)


def _small_rope(rope: dict[str, Any], half: int) -> dict[str, Any]:
    """Return rotary parameters with as many entries as the small heads have pairs."""
    small: dict[str, Any] = {}
    for key, value in rope.items():
        if isinstance(value, dict):
            small[key] = _small_rope(value, half)
        elif key in ("short_factor", "long_factor"):
            small[key] = value[:half]
        elif key == "mrope_section":
            small[key] = [half - half // 3 * 2, half // 3, half // 3]
        else:
            small[key] = value
    return small
