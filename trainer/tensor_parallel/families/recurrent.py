"""Families with state-space, recurrent, or convolution layers."""

from __future__ import annotations

from trainer.tensor_parallel.families.common import ATTENTION, PER_HEAD, ROUTER, Entries
from trainer.tensor_parallel.styles import (
    Attribute,
    Column,
    Computed,
    Divide,
    EnterInput,
    EnterOutput,
    Experts,
    FirstRankOnly,
    GatherOutput,
    GroupedRMSNorm,
    KeyValueColumn,
    PackedColumn,
    Part,
    ReduceOutput,
    Replicated,
    Row,
    RowEnterOutput,
    RowScatterOutput,
    RowSplitInput,
    ShardedParameter,
    Unfused,
)

SMALL = Replicated("low rank; its outputs are few, and used by all heads")

_ATTENTION: Entries = {
    ".q_proj": Column(unit="head_dim"),
    ".k_proj": KeyValueColumn(unit="head_dim"),
    ".v_proj": KeyValueColumn(unit="head_dim"),
    ".o_proj": Row(),
}

_MLP: Entries = {".gate_proj": Column(), ".up_proj": Column(), ".down_proj": Row()}

_MAMBA: Entries = {
    # Channels are sharded; the state of each depends on B, C and dt, which all channels together give.
    "": (Divide("intermediate_size"), Unfused()),
    ".in_proj": PackedColumn(),
    ".conv1d": ShardedParameter(dim=0),
    ".x_proj": RowEnterOutput(),
    ".dt_proj.weight": ShardedParameter(dim=0),
    ".dt_proj.bias": ShardedParameter(dim=0),
    ".A_log": ShardedParameter(dim=0),
    ".D": ShardedParameter(dim=0),
    ".out_proj": Row(),
    ".dt_layernorm": PER_HEAD,
    ".b_layernorm": PER_HEAD,
    ".c_layernorm": PER_HEAD,
}

_X = Part("intermediate_size", unit="head_dim")

_BC = Part("n_groups*ssm_state_size", unit="ssm_state_size", shared=True)

_ZXBC_DT = (_X, _X, _BC, _BC, Part("num_heads"))

_MAMBA2: Entries = {
    # Heads are sharded. B and C, which a group of heads shares, are on every rank that has heads of the group.
    "": (
        Divide(
            "num_heads",
            "intermediate_size",
            "n_groups",
            Computed("conv_dim", "intermediate_size+2*n_groups*ssm_state_size"),
        ),
        Unfused(),
    ),
    ".in_proj": PackedColumn(parts=_ZXBC_DT),
    ".mup_vector": ShardedParameter(dim=2, parts=_ZXBC_DT),
    ".conv1d": ShardedParameter(dim=0, parts=(_X, _BC, _BC)),
    ".dt_bias": ShardedParameter(dim=0),
    ".A_log": ShardedParameter(dim=0),
    ".D": ShardedParameter(dim=0),
    ".norm": GroupedRMSNorm(),
    ".out_proj": Row(),
}

_ZAMBA: Entries = {
    # Mamba with several heads, each with its own B, C and dt: whole heads are sharded. x and z alternate in `in_proj`.
    "": Divide("n_mamba_heads", "intermediate_size"),
    ".in_proj": Column(unit="2*mamba_head_dim"),
    ".conv1d": ShardedParameter(dim=0, parts=(Part("intermediate_size", unit="mamba_head_dim"),)),
    ".x_proj_weight": ShardedParameter(dim=0),
    ".dt_proj_weight": ShardedParameter(dim=0),
    ".dt_proj_bias": ShardedParameter(dim=0),
    ".A_log": ShardedParameter(dim=0),
    ".D": ShardedParameter(dim=0),
    ".out_proj": Row(),
}

_RECURRENT_GEMMA: Entries = {
    **_ATTENTION,
    "": Divide(Attribute("lru_width", optional=True)),
    ".linear_y": Column(),
    ".linear_x": Column(),
    ".conv_1d": ShardedParameter(dim=0),
    ".rg_lru": Divide("num_attention_heads"),
    ".rg_lru.recurrent_param": ShardedParameter(dim=0),
    ".rg_lru.input_gate_weight": ShardedParameter(dim=0),
    ".rg_lru.input_gate_bias": ShardedParameter(dim=0),
    ".rg_lru.recurrent_gate_weight": ShardedParameter(dim=0),
    ".rg_lru.recurrent_gate_bias": ShardedParameter(dim=0),
    ".linear_out": Row(),
}

_RWKV: Entries = {
    # Key, value and receptance read three mixtures of one input: it enters the region, and they are mixed inside.
    "attention": (EnterInput(), Divide("attention_hidden_size")),
    "attention.time_mix_key": PER_HEAD,
    "attention.time_mix_value": PER_HEAD,
    "attention.time_mix_receptance": PER_HEAD,
    "attention.key": ShardedParameter(dim=0),
    "attention.value": ShardedParameter(dim=0),
    "attention.receptance": ShardedParameter(dim=0),
    "attention.time_decay": ShardedParameter(dim=0),
    "attention.time_first": ShardedParameter(dim=0),
    "attention.output": Row(),
    # The receptance multiplies the sum: each rank multiplies its part of both.
    "feed_forward": (EnterInput(), GatherOutput()),
    "feed_forward.time_mix_key": PER_HEAD,
    "feed_forward.time_mix_receptance": PER_HEAD,
    "feed_forward.key": ShardedParameter(dim=0),
    "feed_forward.receptance": ShardedParameter(dim=0),
    "feed_forward.value": RowScatterOutput(),
}

_QK, _VO = Part("qk_dim", unit="qk_dim//num_heads"), Part("v_dim", unit="v_dim//num_heads")

_XLSTM: Entries = {
    "mlstm_layer": Divide("qk_dim", "v_dim", Attribute("num_heads", in_config=True)),
    "mlstm_layer.q": Column(unit="qk_dim//num_heads"),
    "mlstm_layer.k": Column(unit="qk_dim//num_heads"),
    "mlstm_layer.v": Column(unit="v_dim//num_heads"),
    "mlstm_layer.ogate_preact": Column(unit="v_dim//num_heads"),
    "mlstm_layer.igate_preact": Column(),
    "mlstm_layer.fgate_preact": Column(),
    "mlstm_layer.qkv_opreact": PackedColumn(parts=(_QK, _QK, _VO, _VO)),
    "mlstm_layer.ifgate_preact": PackedColumn(),
    "mlstm_layer.multihead_norm": (ShardedParameter(dim=0), Divide("num_heads")),
    "mlstm_layer.out_proj": Row(),
    "ffn": Divide("up_proj_dim"),
    "ffn.proj_up_gate": Column(),
    "ffn.proj_up": Column(),
    "ffn.proj_up_gate_z": PackedColumn(),
    "ffn.proj_down": Row(),
}

_SHORT_CONVOLUTION: Entries = {
    "layers.*.conv.in_proj": PackedColumn(count=3),
    "layers.*.conv.conv": ShardedParameter(dim=0),
    "layers.*.conv.out_proj": Row(),
    "layers.*.feed_forward.w1": Column(),
    "layers.*.feed_forward.w3": Column(),
    "layers.*.feed_forward.w2": Row(),
    "layers.*.feed_forward.gate": ROUTER,
}

_LFM2: Entries = _SHORT_CONVOLUTION | {
    "layers.*.self_attn.q_proj": Column(unit="head_dim"),
    "layers.*.self_attn.k_proj": KeyValueColumn(unit="head_dim"),
    "layers.*.self_attn.v_proj": KeyValueColumn(unit="head_dim"),
    "layers.*.self_attn.q_layernorm": PER_HEAD,
    "layers.*.self_attn.k_layernorm": PER_HEAD,
    "layers.*.self_attn.out_proj": Row(),
}

_LAYERS_MAMBA2: Entries = {f"layers.*.mamba{name}": row for name, row in _MAMBA2.items()}

_FEED_FORWARD: Entries = {f"layers.*.feed_forward{name}": row for name, row in _MLP.items()}

_GRANITE: Entries = ATTENTION | {
    "layers.*.block_sparse_moe.router": ROUTER,
    "layers.*.shared_mlp.input_linear": PackedColumn(),
    "layers.*.shared_mlp.output_linear": Row(),
}


PLANS: dict[str, Entries] = {
    "mamba": {f"layers.*.mixer{name}": row for name, row in _MAMBA.items()},
    "falcon_mamba": {f"layers.*.mixer{name}": row for name, row in _MAMBA.items()},
    "mamba2": {f"layers.*.mixer{name}": row for name, row in _MAMBA2.items()},
    "bamba": _LAYERS_MAMBA2 | _FEED_FORWARD,
    "falcon_h1": _LAYERS_MAMBA2 | ATTENTION | _FEED_FORWARD,
    "jamba": {f"layers.*.mamba{name}": row for name, row in _MAMBA.items()}
    | ATTENTION
    | _FEED_FORWARD
    | {"layers.*.feed_forward.router": ROUTER},
    "nemotron_h": {
        f"layers.*.mixer{name}": row
        for name, row in {
            **_ATTENTION,
            **_MLP,
            ".gate": ROUTER,
            ".experts": Experts(),
            ".experts.up_proj": Column(),
            ".experts.down_proj": Row(),
            ".shared_experts.up_proj": Column(),
            ".shared_experts.down_proj": Row(),
            **_MAMBA2,
            # The mixers of attention and MLP layers have the same name.
            "": (
                Divide(
                    Attribute("num_heads", optional=True),
                    Attribute("intermediate_size", optional=True),
                    Attribute("n_groups", optional=True),
                    Computed("conv_dim", "intermediate_size+2*n_groups*ssm_state_size", optional=True),
                ),
                Unfused("conv1d"),
            ),
            ".fc1_latent_proj": Replicated("a latent; its outputs are few, and routed"),
            ".fc2_latent_proj": Replicated("a latent; its inputs are few, and summed"),
        }.items()
    },
    "zamba": {f"layers.*.mamba{name}": row for name, row in _ZAMBA.items()}
    | {f"layers.*.mamba_decoder.mamba{name}": row for name, row in _ZAMBA.items()}
    | {f"layers.*.shared_transf.self_attn{name}": row for name, row in _ATTENTION.items()}
    | {f"layers.*.shared_transf.feed_forward{name}": row for name, row in _MLP.items()}
    | {
        "layers.*.mamba_decoder.input_layernorm": Replicated(),
        "layers.*.shared_transf.input_layernorm": Replicated(),
        "layers.*.shared_transf.pre_ff_layernorm": Replicated(),
        "layers.*.linear": RowSplitInput(),
    },
    "zamba2": _LAYERS_MAMBA2
    | {f"layers.*.mamba_decoder.mamba{name}": row for name, row in _MAMBA2.items()}
    | {f"layers.*.shared_transformer.self_attn{name}": row for name, row in _ATTENTION.items()}
    | {
        "layers.*.shared_transformer.feed_forward.gate_up_proj": PackedColumn(),
        "layers.*.shared_transformer.feed_forward.down_proj": Row(),
        "layers.*.shared_transformer.feed_forward.gate_up_proj_adapter_list.*.0": SMALL,
        "layers.*.shared_transformer.feed_forward.gate_up_proj_adapter_list.*.1": PackedColumn(),
        "layers.*.shared_transformer.self_attn.linear_q_adapter_list.*.0": SMALL,
        "layers.*.shared_transformer.self_attn.linear_k_adapter_list.*.0": SMALL,
        "layers.*.shared_transformer.self_attn.linear_v_adapter_list.*.0": SMALL,
        "layers.*.shared_transformer.self_attn.linear_q_adapter_list.*.1": Column(unit="attention_head_dim"),
        "layers.*.shared_transformer.self_attn.linear_k_adapter_list.*.1": Column(unit="attention_head_dim"),
        "layers.*.shared_transformer.self_attn.linear_v_adapter_list.*.1": Column(unit="attention_head_dim"),
        "layers.*.mamba_decoder.input_layernorm": Replicated(),
        "layers.*.shared_transformer.input_layernorm": Replicated(),
        "layers.*.shared_transformer.pre_ff_layernorm": Replicated(),
        "layers.*.linear": RowSplitInput(),
    },
    "granitemoehybrid": _LAYERS_MAMBA2 | _GRANITE,
    "granitemoe": _GRANITE,
    "granitemoe_swa": _GRANITE,
    "granitemoeshared": _GRANITE,
    "recurrent_gemma": {f"layers.*.temporal_block{name}": row for name, row in _RECURRENT_GEMMA.items()}
    | {f"layers.*.mlp_block{name}": row for name, row in _MLP.items()},
    "rwkv": {f"blocks.*.{name}": row for name, row in _RWKV.items()},
    "xlstm": {f"blocks.*.{name}": row for name, row in _XLSTM.items()},
    "lfm2": _LFM2,
    "lfm2_moe": _LFM2,
    "lfm3": _SHORT_CONVOLUTION
    | ATTENTION
    | {
        "layers.*.self_attn.q_norm": PER_HEAD,
        "layers.*.self_attn.k_norm": PER_HEAD,
        "layers.*.self_attn.g_proj": Column(),
    },
    "jetmoe": {
        # Gates multiply the experts' partial sums, so the sum is the block's.
        "layers.*.self_attention": ReduceOutput(),
        "layers.*.self_attention.kv_proj": PackedColumn(unit="head_dim"),
        "layers.*.self_attention.experts": Divide("hidden_size"),
        "layers.*.self_attention.experts.router": EnterOutput(2),
        "layers.*.self_attention.experts.router.layer": ROUTER,
        "layers.*.self_attention.experts.input_linear": Column(unit="kv_channels"),
        "layers.*.self_attention.experts.output_linear": ShardedParameter(dim=2),
        "layers.*.self_attention.experts.bias": FirstRankOnly(),
        "layers.*.mlp": ReduceOutput(),
        "layers.*.mlp.router": EnterOutput(2),
        "layers.*.mlp.router.layer": ROUTER,
        "layers.*.mlp.input_linear": PackedColumn(),
        "layers.*.mlp.output_linear": ShardedParameter(dim=2),
        "layers.*.mlp.bias": FirstRankOnly(),
    },
}
