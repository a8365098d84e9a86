"""Families with linear attention or delta rules."""

from __future__ import annotations

from trainer.tensor_parallel.families.common import ATTENTION, INDEXER, PER_HEAD, Entries
from trainer.tensor_parallel.styles import (
    Attribute,
    Column,
    Divide,
    EnterInput,
    KeyValueColumn,
    PackedColumn,
    Part,
    Replicated,
    ReplicatedSumGradient,
    RMSNorm,
    Row,
    ShardedParameter,
)

_STREAMS = Replicated("of the residual streams, which are full")

_ATTENTION: Entries = {
    ".q_proj": Column(unit="head_dim"),
    ".k_proj": KeyValueColumn(unit="head_dim"),
    ".v_proj": KeyValueColumn(unit="head_dim"),
    ".o_proj": Row(),
}

_LATENT = ReplicatedSumGradient("a latent; its outputs are few, and used by all heads")

_DELTA: Entries = {
    # Kimi's delta attention and latent attention, under one name. Their input enters, and latents are made inside:
    # to sum a latent's weight gradient costs less than to let latent after latent enter.
    "": (EnterInput(), Divide("num_heads", Attribute("qkv_dim", optional=True))),
    ".q_proj": ShardedParameter(dim=0),
    ".q_a_proj": _LATENT,
    ".q_a_layernorm": PER_HEAD,
    ".q_b_proj": ShardedParameter(dim=0, unit="qk_head_dim"),
    ".k_proj": ShardedParameter(dim=0),
    ".v_proj": ShardedParameter(dim=0),
    ".conv1d": ShardedParameter(dim=0, count=3, unit="head_dim"),
    ".forget_gate": Divide("num_heads"),
    ".forget_gate.f_a_proj": _LATENT,
    ".forget_gate.f_b_proj": ShardedParameter(dim=0, unit="head_dim"),
    ".forget_gate.f_proj": ShardedParameter(dim=0, unit="head_dim"),
    ".forget_gate.dt_bias": ShardedParameter(dim=0),
    ".b_proj": ShardedParameter(dim=0),
    ".g_a_proj": _LATENT,
    ".g_b_proj": ShardedParameter(dim=0, unit="head_dim"),
    ".g_proj": ShardedParameter(dim=0),
    ".o_norm": PER_HEAD,
    ".kv_a_proj_with_mqa": _LATENT,
    ".kv_a_layernorm": PER_HEAD,
    ".kv_b_proj": ShardedParameter(dim=0, unit="qk_nope_head_dim+v_head_dim"),
    ".o_proj": Row(),
}

_K = Part("key_dim", unit="head_k_dim")

_V = Part("value_dim", unit="head_v_dim*num_v_heads//num_k_heads")

_GATED_DELTA: Entries = {
    # Whole key heads are sharded, with the value heads that share each of them.
    "layers.*.linear_attn": Divide("num_k_heads", "num_v_heads", "key_dim", "value_dim"),
    "layers.*.linear_attn.in_proj_qkvz": Column(unit="2*head_k_dim+2*head_v_dim*num_v_heads//num_k_heads"),
    "layers.*.linear_attn.in_proj_ba": Column(unit="2*num_v_heads//num_k_heads"),
    "layers.*.linear_attn.in_proj_qkv": PackedColumn(parts=(_K, _K, _V)),
    "layers.*.linear_attn.in_proj_z": Column(unit="head_v_dim*num_v_heads//num_k_heads"),
    "layers.*.linear_attn.in_proj_a": Column(unit="num_v_heads//num_k_heads"),
    "layers.*.linear_attn.in_proj_b": Column(unit="num_v_heads//num_k_heads"),
    "layers.*.linear_attn.conv1d": ShardedParameter(dim=0, parts=(_K, _K, _V)),
    "layers.*.linear_attn.A_log": ShardedParameter(dim=0),
    "layers.*.linear_attn.dt_bias": ShardedParameter(dim=0),
    "layers.*.linear_attn.norm": PER_HEAD,
    "layers.*.linear_attn.out_proj": Row(),
    # A query and a gate, head by head.
    "layers.*.self_attn.q_proj": Column(unit="2*head_dim"),
}


PLANS: dict[str, Entries] = {
    "minimax": {
        # Lightning attention: query, key and value next to each other, head by head. Full attention is Hugging Face's.
        "layers.*.self_attn": Divide(Attribute("num_attention_heads", optional=True)),
        "layers.*.self_attn.qkv_proj": Column(unit="3*head_dim"),
        "layers.*.self_attn.output_gate": Column(unit="head_dim"),
        "layers.*.self_attn.norm": RMSNorm(),
        "layers.*.self_attn.slope_rate": ShardedParameter(dim=0),
        "layers.*.self_attn.query_decay": ShardedParameter(dim=0),
        "layers.*.self_attn.key_decay": ShardedParameter(dim=0),
        "layers.*.self_attn.diagonal_decay": ShardedParameter(dim=1),
        "layers.*.self_attn.out_proj": Row(),
    },
    "kimi_linear": {f"layers.*.self_attn{name}": row for name, row in _DELTA.items()}
    | {"layers.*.self_attn.forget_gate.A_log": ShardedParameter(dim=2)},
    "bailing_hybrid": {f"layers.*.self_attn{name}": row for name, row in _DELTA.items()}
    | {"layers.*.self_attn.forget_gate.A_log": ShardedParameter(dim=0)},
    "olmo_hybrid": {
        "layers.*.linear_attn": Divide("num_k_heads", "num_v_heads", "key_dim", "value_dim"),
        "layers.*.linear_attn.q_proj": Column(unit="head_k_dim"),
        "layers.*.linear_attn.k_proj": Column(unit="head_k_dim"),
        "layers.*.linear_attn.v_proj": Column(unit="head_v_dim*num_v_heads//num_k_heads"),
        "layers.*.linear_attn.g_proj": Column(unit="head_v_dim*num_v_heads//num_k_heads"),
        "layers.*.linear_attn.a_proj": Column(unit="num_v_heads//num_k_heads"),
        "layers.*.linear_attn.b_proj": Column(unit="num_v_heads//num_k_heads"),
        "layers.*.linear_attn.conv1d": ShardedParameter(dim=0, parts=(_K, _K, _V)),
        "layers.*.linear_attn.A_log": ShardedParameter(dim=0),
        "layers.*.linear_attn.dt_bias": ShardedParameter(dim=0),
        "layers.*.linear_attn.o_norm": PER_HEAD,
        "layers.*.linear_attn.o_proj": Row(),
        **ATTENTION,
        # The norms sum over all heads.
        "layers.*.self_attn.q_norm": RMSNorm(unit="head_dim"),
        "layers.*.self_attn.k_norm": RMSNorm(parts=(Part(unit="head_dim", shared=True),)),
    },
    "qwen3_next": _GATED_DELTA,
    "qwen3_5_text": _GATED_DELTA,
    "qwen3_5_moe_text": _GATED_DELTA,
    "qwen4_exp_text": ATTENTION
    | _GATED_DELTA
    | {
        "layers.*.self_attn.q_norm": PER_HEAD,
        "layers.*.self_attn.k_norm": PER_HEAD,
        "layers.*.self_attn.indexer.index_qk_proj": INDEXER,
        "layers.*.self_attn.indexer.q_layernorm": INDEXER,
        "layers.*.self_attn.indexer.k_layernorm": INDEXER,
        "layers.*.attn_hyper_connection.hc_norm": Replicated(),
        "layers.*.attn_hyper_connection.input_mix_weight_down": _STREAMS,
        "layers.*.attn_hyper_connection.input_mix_weight_up": _STREAMS,
        "layers.*.attn_hyper_connection.block_inject_weight": _STREAMS,
        "layers.*.mlp_hyper_connection.hc_norm": Replicated(),
        "layers.*.mlp_hyper_connection.input_mix_weight_down": _STREAMS,
        "layers.*.mlp_hyper_connection.input_mix_weight_up": _STREAMS,
        "layers.*.mlp_hyper_connection.block_inject_weight": _STREAMS,
        "hyper_connection_mixer.hc_norm": Replicated(),
        "hyper_connection_mixer.input_mix_weight_down": _STREAMS,
        "hyper_connection_mixer.input_mix_weight_up": _STREAMS,
        "layers.*.ple.key_proj": _STREAMS,
        "layers.*.ple.value_proj": _STREAMS,
        "layers.*.ple.norm_key": Replicated(),
        "layers.*.ple.norm_query": Replicated(),
        "layers.*.ple.norm_conv": Replicated(),
        "layers.*.ple.conv1d": _STREAMS,
    },
}
