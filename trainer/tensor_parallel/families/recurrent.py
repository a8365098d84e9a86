"""Families with state-space, linear-attention, or convolution layers."""

from __future__ import annotations

from trainer.tensor_parallel.families.common import ROUTER, Rows

SMALL = "replicate:low rank; its outputs are few, and used by all heads"
_INDEXER = "replicate:an indexer; it picks the tokens for all heads, and learns nothing"
_STREAMS = "replicate:of the residual streams, which are whole"
PER_HEAD = "replicated_with_grad_allreduce"
"""A whole parameter that each rank uses on its own heads or channels."""

# -- parts of a layer; their names are appended to a module's, "" being the module itself --------------------------

_ATTENTION: Rows = {
    ".q_proj": "colwise:head_dim",
    ".k_proj": "kv_colwise:head_dim",
    ".v_proj": "kv_colwise:head_dim",
    ".o_proj": "rowwise",
}
_MLP: Rows = {".gate_proj": "colwise", ".up_proj": "colwise", ".down_proj": "rowwise"}

_MAMBA: Rows = {
    # Channels are cut; the state of each depends on B, C and dt, which all channels together give.
    "": "divide:intermediate_size + unfused",
    ".in_proj": "packed_colwise:2",
    ".conv1d": "cut:0",
    ".x_proj": "rowwise_enter",
    ".dt_proj.weight": "cut:0",
    ".dt_proj.bias": "cut:0",
    ".A_log": "cut:0",
    ".D": "cut:0",
    ".out_proj": "rowwise",
    ".dt_layernorm": PER_HEAD,
    ".b_layernorm": PER_HEAD,
    ".c_layernorm": PER_HEAD,
}

_X = "intermediate_size/head_dim"
_BC = "~n_groups*ssm_state_size/ssm_state_size,~n_groups*ssm_state_size/ssm_state_size"
_PARTS = f"{_X},{_X},{_BC},num_heads"
_MAMBA2: Rows = {
    # Heads are cut. B and C, which a group of heads shares, lie on every rank that has heads of the group.
    "": "divide:num_heads,intermediate_size,n_groups,conv_dim=intermediate_size+2*n_groups*ssm_state_size + unfused",
    ".in_proj": f"packed_colwise:{_PARTS}",
    ".mup_vector": f"cut:2:{_PARTS}",
    ".conv1d": f"cut:0:{_X},{_BC}",
    ".dt_bias": "cut:0",
    ".A_log": "cut:0",
    ".D": "cut:0",
    ".norm": "grouped_rms_norm",
    ".out_proj": "rowwise",
}

_ZAMBA: Rows = {
    # Mamba with several heads, each with B, C and dt of its own: whole heads are cut. x and z alternate in `in_proj`.
    "": "divide:n_mamba_heads,intermediate_size",
    ".in_proj": "colwise:2*mamba_head_dim",
    ".conv1d": "cut:0:intermediate_size/mamba_head_dim",
    ".x_proj_weight": "cut:0",
    ".dt_proj_weight": "cut:0",
    ".dt_proj_bias": "cut:0",
    ".A_log": "cut:0",
    ".D": "cut:0",
    ".out_proj": "rowwise",
}

_RECURRENT_GEMMA: Rows = {
    **_ATTENTION,
    "": "divide:lru_width?",
    ".linear_y": "colwise",
    ".linear_x": "colwise",
    ".conv_1d": "cut:0",
    ".rg_lru": "divide:num_attention_heads",
    ".rg_lru.recurrent_param": "cut:0",
    ".rg_lru.input_gate_weight": "cut:0",
    ".rg_lru.input_gate_bias": "cut:0",
    ".rg_lru.recurrent_gate_weight": "cut:0",
    ".rg_lru.recurrent_gate_bias": "cut:0",
    ".linear_out": "rowwise",
}

_RWKV: Rows = {
    # Key, value and receptance read three mixtures of one input: that enters, and they are mixed inside.
    "attention": "enter + divide:attention_hidden_size",
    "attention.time_mix_key": PER_HEAD,
    "attention.time_mix_value": PER_HEAD,
    "attention.time_mix_receptance": PER_HEAD,
    "attention.key": "cut:0",
    "attention.value": "cut:0",
    "attention.receptance": "cut:0",
    "attention.time_decay": "cut:0",
    "attention.time_first": "cut:0",
    "attention.output": "rowwise",
    # The receptance multiplies the sum: each rank multiplies its part of both.
    "feed_forward": "enter + gather_output",
    "feed_forward.time_mix_key": PER_HEAD,
    "feed_forward.time_mix_receptance": PER_HEAD,
    "feed_forward.key": "cut:0",
    "feed_forward.receptance": "cut:0",
    "feed_forward.value": "rowwise_scatter_output",
}

_QK, _VO = "qk_dim/qk_dim//num_heads", "v_dim/v_dim//num_heads"
_XLSTM: Rows = {
    "mlstm_layer": "divide:qk_dim,v_dim,config.num_heads",
    "mlstm_layer.q": "colwise:qk_dim//num_heads",
    "mlstm_layer.k": "colwise:qk_dim//num_heads",
    "mlstm_layer.v": "colwise:v_dim//num_heads",
    "mlstm_layer.ogate_preact": "colwise:v_dim//num_heads",
    "mlstm_layer.igate_preact": "colwise",
    "mlstm_layer.fgate_preact": "colwise",
    "mlstm_layer.qkv_opreact": f"packed_colwise:{_QK},{_QK},{_VO},{_VO}",
    "mlstm_layer.ifgate_preact": "packed_colwise",
    "mlstm_layer.multihead_norm": "cut:0 + divide:num_heads",
    "mlstm_layer.out_proj": "rowwise",
    "ffn": "divide:up_proj_dim",
    "ffn.proj_up_gate": "colwise",
    "ffn.proj_up": "colwise",
    "ffn.proj_up_gate_z": "packed_colwise",
    "ffn.proj_down": "rowwise",
}

_SHORT_CONVOLUTION: Rows = {
    "layers.*.conv.in_proj": "packed_colwise:3",
    "layers.*.conv.conv": "cut:0",
    "layers.*.conv.out_proj": "rowwise",
    "layers.*.feed_forward.w1": "colwise",
    "layers.*.feed_forward.w3": "colwise",
    "layers.*.feed_forward.w2": "rowwise",
    "layers.*.feed_forward.gate": ROUTER,
}

_LFM2: Rows = _SHORT_CONVOLUTION | {
    "layers.*.self_attn.q_proj": "colwise:head_dim",
    "layers.*.self_attn.k_proj": "kv_colwise:head_dim",
    "layers.*.self_attn.v_proj": "kv_colwise:head_dim",
    "layers.*.self_attn.q_layernorm": PER_HEAD,
    "layers.*.self_attn.k_layernorm": PER_HEAD,
    "layers.*.self_attn.out_proj": "rowwise",
}

_LATENT = "replicated_with_grad_allreduce:a latent; its outputs are few, and used by all heads"
_DELTA: Rows = {
    # Kimi's delta attention and latent attention, under one name. Their input enters, and latents are made inside:
    # to sum a latent's weight gradient costs less than to let latent after latent enter.
    "": "enter + divide:num_heads,qkv_dim?",
    ".q_proj": "cut:0",
    ".q_a_proj": _LATENT,
    ".q_a_layernorm": PER_HEAD,
    ".q_b_proj": "cut:0:all/qk_head_dim",
    ".k_proj": "cut:0",
    ".v_proj": "cut:0",
    ".conv1d": "cut:0:3/head_dim",
    ".forget_gate": "divide:num_heads",
    ".forget_gate.f_a_proj": _LATENT,
    ".forget_gate.f_b_proj": "cut:0:all/head_dim",
    ".forget_gate.f_proj": "cut:0:all/head_dim",
    ".forget_gate.dt_bias": "cut:0",
    ".b_proj": "cut:0",
    ".g_a_proj": _LATENT,
    ".g_b_proj": "cut:0:all/head_dim",
    ".g_proj": "cut:0",
    ".o_norm": PER_HEAD,
    ".kv_a_proj_with_mqa": _LATENT,
    ".kv_a_layernorm": PER_HEAD,
    ".kv_b_proj": "cut:0:all/qk_nope_head_dim+v_head_dim",
    ".o_proj": "rowwise",
}

_K, _V = "key_dim/head_k_dim", "value_dim/head_v_dim*num_v_heads//num_k_heads"
_GATED_DELTA: Rows = {
    # Whole key heads are cut, and the value heads that share each of them.
    "layers.*.linear_attn": "divide:num_k_heads,num_v_heads,key_dim,value_dim",
    "layers.*.linear_attn.in_proj_qkvz": "colwise:2*head_k_dim+2*head_v_dim*num_v_heads//num_k_heads",
    "layers.*.linear_attn.in_proj_ba": "colwise:2*num_v_heads//num_k_heads",
    "layers.*.linear_attn.in_proj_qkv": f"packed_colwise:{_K},{_K},{_V}",
    "layers.*.linear_attn.in_proj_z": "colwise:head_v_dim*num_v_heads//num_k_heads",
    "layers.*.linear_attn.in_proj_a": "colwise:num_v_heads//num_k_heads",
    "layers.*.linear_attn.in_proj_b": "colwise:num_v_heads//num_k_heads",
    "layers.*.linear_attn.conv1d": f"cut:0:{_K},{_K},{_V}",
    "layers.*.linear_attn.A_log": "cut:0",
    "layers.*.linear_attn.dt_bias": "cut:0",
    "layers.*.linear_attn.norm": PER_HEAD,
    "layers.*.linear_attn.out_proj": "rowwise",
    # A query and a gate, head by head.
    "layers.*.self_attn.q_proj": "colwise:2*head_dim",
}

_LAYERS_MAMBA2: Rows = {f"layers.*.mamba{name}": row for name, row in _MAMBA2.items()}
_SELF_ATTENTION: Rows = {f"layers.*.self_attn{name}": row for name, row in _ATTENTION.items()}
_FEED_FORWARD: Rows = {f"layers.*.feed_forward{name}": row for name, row in _MLP.items()}

_GRANITE: Rows = _SELF_ATTENTION | {
    "layers.*.block_sparse_moe.router": ROUTER,
    "layers.*.shared_mlp.input_linear": "packed_colwise",
    "layers.*.shared_mlp.output_linear": "rowwise",
}

PLANS: dict[str, Rows] = {
    "mamba": {f"layers.*.mixer{name}": row for name, row in _MAMBA.items()},
    "falcon_mamba": {f"layers.*.mixer{name}": row for name, row in _MAMBA.items()},
    "mamba2": {f"layers.*.mixer{name}": row for name, row in _MAMBA2.items()},
    "bamba": _LAYERS_MAMBA2 | _FEED_FORWARD,
    "falcon_h1": _LAYERS_MAMBA2 | _SELF_ATTENTION | _FEED_FORWARD,
    "jamba": {f"layers.*.mamba{name}": row for name, row in _MAMBA.items()}
    | _SELF_ATTENTION
    | _FEED_FORWARD
    | {"layers.*.feed_forward.router": ROUTER},
    "nemotron_h": {
        f"layers.*.mixer{name}": row
        for name, row in {
            **_ATTENTION,
            **_MLP,
            ".gate": ROUTER,
            ".experts": "moe_tp_experts",
            ".experts.up_proj": "colwise",
            ".experts.down_proj": "rowwise",
            ".shared_experts.up_proj": "colwise",
            ".shared_experts.down_proj": "rowwise",
            **_MAMBA2,
            # The mixers of attention and MLP layers have the same name.
            "": "divide:num_heads?,intermediate_size?,n_groups?,conv_dim?=intermediate_size+2*n_groups*ssm_state_size"
            " + unfused:conv1d",
            ".fc1_latent_proj": "replicate:a latent; its outputs are few, and routed",
            ".fc2_latent_proj": "replicate:a latent; its inputs are few, and summed",
        }.items()
    },
    "zamba": {f"layers.*.mamba{name}": row for name, row in _ZAMBA.items()}
    | {f"layers.*.mamba_decoder.mamba{name}": row for name, row in _ZAMBA.items()}
    | {f"layers.*.shared_transf.self_attn{name}": row for name, row in _ATTENTION.items()}
    | {f"layers.*.shared_transf.feed_forward{name}": row for name, row in _MLP.items()}
    | {
        "layers.*.mamba_decoder.input_layernorm": "replicate",
        "layers.*.shared_transf.input_layernorm": "replicate",
        "layers.*.shared_transf.pre_ff_layernorm": "replicate",
        "layers.*.linear": "rowwise_split_input",
    },
    "zamba2": _LAYERS_MAMBA2
    | {f"layers.*.mamba_decoder.mamba{name}": row for name, row in _MAMBA2.items()}
    | {f"layers.*.shared_transformer.self_attn{name}": row for name, row in _ATTENTION.items()}
    | {
        "layers.*.shared_transformer.feed_forward.gate_up_proj": "packed_colwise",
        "layers.*.shared_transformer.feed_forward.down_proj": "rowwise",
        "layers.*.shared_transformer.feed_forward.gate_up_proj_adapter_list.*.0": SMALL,
        "layers.*.shared_transformer.feed_forward.gate_up_proj_adapter_list.*.1": "packed_colwise",
        "layers.*.shared_transformer.self_attn.linear_q_adapter_list.*.0": SMALL,
        "layers.*.shared_transformer.self_attn.linear_k_adapter_list.*.0": SMALL,
        "layers.*.shared_transformer.self_attn.linear_v_adapter_list.*.0": SMALL,
        "layers.*.shared_transformer.self_attn.linear_q_adapter_list.*.1": "colwise:attention_head_dim",
        "layers.*.shared_transformer.self_attn.linear_k_adapter_list.*.1": "colwise:attention_head_dim",
        "layers.*.shared_transformer.self_attn.linear_v_adapter_list.*.1": "colwise:attention_head_dim",
        "layers.*.mamba_decoder.input_layernorm": "replicate",
        "layers.*.shared_transformer.input_layernorm": "replicate",
        "layers.*.shared_transformer.pre_ff_layernorm": "replicate",
        "layers.*.linear": "rowwise_split_input",
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
    | _SELF_ATTENTION
    | {
        "layers.*.self_attn.q_norm": PER_HEAD,
        "layers.*.self_attn.k_norm": PER_HEAD,
        "layers.*.self_attn.g_proj": "colwise",
    },
    "minimax": {
        # Lightning attention: query, key and value side by side, head by head. Full attention is Hugging Face's.
        "layers.*.self_attn": "divide:num_attention_heads?",
        "layers.*.self_attn.qkv_proj": "colwise:3*head_dim",
        "layers.*.self_attn.output_gate": "colwise:head_dim",
        "layers.*.self_attn.norm": "rms_norm",
        "layers.*.self_attn.slope_rate": "cut:0",
        "layers.*.self_attn.query_decay": "cut:0",
        "layers.*.self_attn.key_decay": "cut:0",
        "layers.*.self_attn.diagonal_decay": "cut:1",
        "layers.*.self_attn.out_proj": "rowwise",
    },
    "kimi_linear": {f"layers.*.self_attn{name}": row for name, row in _DELTA.items()}
    | {"layers.*.self_attn.forget_gate.A_log": "cut:2"},
    "bailing_hybrid": {f"layers.*.self_attn{name}": row for name, row in _DELTA.items()}
    | {"layers.*.self_attn.forget_gate.A_log": "cut:0"},
    "olmo_hybrid": {
        "layers.*.linear_attn": "divide:num_k_heads,num_v_heads,key_dim,value_dim",
        "layers.*.linear_attn.q_proj": "colwise:head_k_dim",
        "layers.*.linear_attn.k_proj": "colwise:head_k_dim",
        "layers.*.linear_attn.v_proj": "colwise:head_v_dim*num_v_heads//num_k_heads",
        "layers.*.linear_attn.g_proj": "colwise:head_v_dim*num_v_heads//num_k_heads",
        "layers.*.linear_attn.a_proj": "colwise:num_v_heads//num_k_heads",
        "layers.*.linear_attn.b_proj": "colwise:num_v_heads//num_k_heads",
        "layers.*.linear_attn.conv1d": f"cut:0:{_K},{_K},{_V}",
        "layers.*.linear_attn.A_log": "cut:0",
        "layers.*.linear_attn.dt_bias": "cut:0",
        "layers.*.linear_attn.o_norm": PER_HEAD,
        "layers.*.linear_attn.o_proj": "rowwise",
        **_SELF_ATTENTION,
        # The norms sum over all heads.
        "layers.*.self_attn.q_norm": "rms_norm:all/head_dim",
        "layers.*.self_attn.k_norm": "rms_norm:~all/head_dim",
    },
    "qwen3_next": _GATED_DELTA,
    "qwen3_5_text": _GATED_DELTA,
    "qwen3_5_moe_text": _GATED_DELTA,
    "qwen4_exp_text": _SELF_ATTENTION
    | _GATED_DELTA
    | {
        "layers.*.self_attn.q_norm": PER_HEAD,
        "layers.*.self_attn.k_norm": PER_HEAD,
        "layers.*.self_attn.indexer.index_qk_proj": _INDEXER,
        "layers.*.self_attn.indexer.q_layernorm": _INDEXER,
        "layers.*.self_attn.indexer.k_layernorm": _INDEXER,
        "layers.*.attn_hyper_connection.hc_norm": "replicate",
        "layers.*.attn_hyper_connection.input_mix_weight_down": _STREAMS,
        "layers.*.attn_hyper_connection.input_mix_weight_up": _STREAMS,
        "layers.*.attn_hyper_connection.block_inject_weight": _STREAMS,
        "layers.*.mlp_hyper_connection.hc_norm": "replicate",
        "layers.*.mlp_hyper_connection.input_mix_weight_down": _STREAMS,
        "layers.*.mlp_hyper_connection.input_mix_weight_up": _STREAMS,
        "layers.*.mlp_hyper_connection.block_inject_weight": _STREAMS,
        "hyper_connection_mixer.hc_norm": "replicate",
        "hyper_connection_mixer.input_mix_weight_down": _STREAMS,
        "hyper_connection_mixer.input_mix_weight_up": _STREAMS,
        "layers.*.ple.key_proj": _STREAMS,
        "layers.*.ple.value_proj": _STREAMS,
        "layers.*.ple.norm_key": "replicate",
        "layers.*.ple.norm_query": "replicate",
        "layers.*.ple.norm_conv": "replicate",
        "layers.*.ple.conv1d": _STREAMS,
    },
    "jetmoe": {
        # Gates multiply the experts' partial sums, so the sum is the block's.
        "layers.*.self_attention": "all_reduce",
        "layers.*.self_attention.kv_proj": "packed_colwise:2/head_dim",
        "layers.*.self_attention.experts": "divide:hidden_size",
        "layers.*.self_attention.experts.router": "enter_output:2",
        "layers.*.self_attention.experts.router.layer": ROUTER,
        "layers.*.self_attention.experts.input_linear": "colwise:kv_channels",
        "layers.*.self_attention.experts.output_linear": "cut:2",
        "layers.*.self_attention.experts.bias": "first_rank",
        "layers.*.mlp": "all_reduce",
        "layers.*.mlp.router": "enter_output:2",
        "layers.*.mlp.router.layer": ROUTER,
        "layers.*.mlp.input_linear": "packed_colwise",
        "layers.*.mlp.output_linear": "cut:2",
        "layers.*.mlp.bias": "first_rank",
    },
}
