"""Families with latent attention, indexers, or several residual streams."""

from __future__ import annotations

from trainer.tensor_parallel.families.common import INDEXER, PER_HEAD, ROUTER, SHARED_EXPERTS, Entries
from trainer.tensor_parallel.styles import (
    Attribute,
    Column,
    Divide,
    EnterOutput,
    LatentProjection,
    Replicated,
    Row,
    ShardedParameter,
)

LATENT = Replicated("a latent; small, and used by all heads")

STREAMS = Replicated("it mixes the residual streams, which are full")

_LATENT_ATTENTION: Entries = {
    "layers.*.self_attn.q_a_proj": LATENT,
    "layers.*.self_attn.q_a_layernorm": Replicated(),
    "layers.*.self_attn.q_proj": Column(unit="qk_head_dim"),
    "layers.*.self_attn.q_b_proj": Column(unit="qk_head_dim"),
    "layers.*.self_attn.kv_a_proj_with_mqa": LatentProjection(),
    "layers.*.self_attn.kv_a_layernorm": Replicated(),
    "layers.*.self_attn.kv_b_proj": Column(unit="qk_nope_head_dim+v_head_dim"),
    "layers.*.self_attn.o_proj": Row(),
}

_INDEXER: Entries = {
    "layers.*.self_attn.indexer.wq_b": INDEXER,
    "layers.*.self_attn.indexer.wk": INDEXER,
    "layers.*.self_attn.indexer.k_norm": Replicated(),
    "layers.*.self_attn.indexer.weights_proj": INDEXER,
}

_STREAMS: Entries = {"layers.*.attn_hc": STREAMS, "layers.*.ffn_hc": STREAMS, "hc_head": STREAMS}


PLANS: dict[str, Entries] = {
    "axk1": {**_LATENT_ATTENTION, "layers.*.mlp.post_mlp_layernorm": Replicated()},
    "axk2": {
        **_LATENT_ATTENTION,
        **_INDEXER,
        "layers.*.self_attn.q_gate_proj": Column(unit="qk_head_dim+v_head_dim"),
        "layers.*.input_layernorm.mlp.fc1": Replicated("a norm's gate, of low rank"),
        "layers.*.input_layernorm.mlp.fc2": Replicated("a norm's gate, of low rank"),
        "layers.*.post_attention_layernorm.mlp.fc1": Replicated("a norm's gate, of low rank"),
        "layers.*.post_attention_layernorm.mlp.fc2": Replicated("a norm's gate, of low rank"),
    },
    "deepseek_v2": _LATENT_ATTENTION,
    "deepseek_v3": _LATENT_ATTENTION,
    "deepseek_v32": {**_LATENT_ATTENTION, **_INDEXER},
    "deepseek_v4": {
        **SHARED_EXPERTS,
        **_STREAMS,
        "layers.*.self_attn": Divide("num_key_value_groups", Attribute("o_groups", in_config=True)),
        "layers.*.self_attn.q_a_proj": LATENT,
        "layers.*.self_attn.q_a_norm": Replicated(),
        "layers.*.self_attn.q_b_proj": Column(unit="head_dim"),
        # One key and value head, which all query heads use, and its compressed past.
        "layers.*.self_attn.kv_proj": Replicated("one key and value head, used by all query heads"),
        "layers.*.self_attn.kv_norm": (Replicated(), EnterOutput()),
        "layers.*.self_attn.compressor": EnterOutput(),
        "layers.*.self_attn.compressor.position_bias": LATENT,
        "layers.*.self_attn.compressor.kv_proj": LATENT,
        "layers.*.self_attn.compressor.gate_proj": LATENT,
        "layers.*.self_attn.compressor.kv_norm": Replicated(),
        "layers.*.self_attn.compressor.indexer.position_bias": INDEXER,
        "layers.*.self_attn.compressor.indexer.kv_proj": INDEXER,
        "layers.*.self_attn.compressor.indexer.gate_proj": INDEXER,
        "layers.*.self_attn.compressor.indexer.kv_norm": Replicated(),
        "layers.*.self_attn.compressor.indexer.q_b_proj": INDEXER,
        "layers.*.self_attn.compressor.indexer.scorer.weights_proj": INDEXER,
        "layers.*.self_attn.sinks": Column(),
        # One matrix for each group of heads; its input is sharded already.
        "layers.*.self_attn.o_a_proj": Divide("n_groups"),
        "layers.*.self_attn.o_a_proj.weight": ShardedParameter(dim=0, unit="o_lora_rank"),
        "layers.*.self_attn.o_b_proj": Row(),
    },
    "dots3_note_text": {
        **_LATENT_ATTENTION,
        **_INDEXER,
        "layers.*.self_attn.k_rope_only_layernorm": PER_HEAD,
    },
    "glm4_moe_lite": {**_LATENT_ATTENTION, **SHARED_EXPERTS},
    "glm_moe_dsa": {**_LATENT_ATTENTION, **_INDEXER},
    "hy_v4": {**_LATENT_ATTENTION, **_INDEXER, **_STREAMS, "layers.*.self_attn.gate_proj": Column(unit="v_head_dim")},
    "longcat_flash": {
        "layers.*.mlp.router.classifier": ROUTER,
        **{name.replace("self_attn", "self_attn.*"): text for name, text in _LATENT_ATTENTION.items()},
    },
    "minicpm3": _LATENT_ATTENTION,
    "youtu": _LATENT_ATTENTION,
}
