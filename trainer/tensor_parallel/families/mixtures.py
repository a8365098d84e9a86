"""Mixtures of experts, latent attention, and other families whose layers are not alike."""

from __future__ import annotations

from trainer.tensor_parallel.families.common import POSITIONS, ROUTER, Rows

LATENT = "replicate:a latent; small, and used by all heads"
INDEXER = "replicate:an indexer; it picks the tokens for all heads, and learns nothing"
STREAMS = "replicate:it mixes the residual streams, which are whole"
CONVOLUTION = "replicate:a short convolution of whole activations"
PER_HEAD = "replicated_with_grad_allreduce"
"""A whole parameter that each rank uses on its own heads."""

_ATTENTION: Rows = {
    "layers.*.self_attn.q_proj": "colwise:head_dim",
    "layers.*.self_attn.k_proj": "kv_colwise:head_dim",
    "layers.*.self_attn.v_proj": "kv_colwise:head_dim",
    "layers.*.self_attn.o_proj": "rowwise",
}

_QK_NORMS: Rows = {"layers.*.self_attn.q_norm": PER_HEAD, "layers.*.self_attn.k_norm": PER_HEAD}

_WIDE_QK_NORMS: Rows = {
    # The norms sum over all heads; the weight of a key head that ranks share is shared with it.
    **_ATTENTION,
    "layers.*.self_attn.q_norm": "rms_norm:all/head_dim",
    "layers.*.self_attn.k_norm": "rms_norm:~all/head_dim",
}

_LATENT_ATTENTION: Rows = {
    "layers.*.self_attn.q_a_proj": LATENT,
    "layers.*.self_attn.q_a_layernorm": "replicate",
    "layers.*.self_attn.q_proj": "colwise:qk_head_dim",
    "layers.*.self_attn.q_b_proj": "colwise:qk_head_dim",
    "layers.*.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
    "layers.*.self_attn.kv_a_layernorm": "replicate",
    "layers.*.self_attn.kv_b_proj": "colwise:qk_nope_head_dim+v_head_dim",
    "layers.*.self_attn.o_proj": "rowwise",
}

_INDEXER: Rows = {
    "layers.*.self_attn.indexer.wq_b": INDEXER,
    "layers.*.self_attn.indexer.wk": INDEXER,
    "layers.*.self_attn.indexer.k_norm": "replicate",
    "layers.*.self_attn.indexer.weights_proj": INDEXER,
}

_MLP: Rows = {
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}

_PACKED_MLP: Rows = {"layers.*.mlp.gate_up_proj": "packed_colwise", "layers.*.mlp.down_proj": "rowwise"}

_PACKED_ATTENTION: Rows = {
    # Where q ends is computed from the configuration.
    "layers.*.self_attn": "divide:config.num_attention_heads,num_key_value_heads",
    "layers.*.self_attn.qkv_proj": "packed_colwise:num_attention_heads*head_dim/head_dim,"
    "~num_key_value_heads*head_dim/head_dim,~num_key_value_heads*head_dim/head_dim",
    "layers.*.self_attn.o_proj": "rowwise",
}

_EXPERTS: Rows = {
    "layers.*.mlp.experts": "moe_tp_experts",
    "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "layers.*.mlp.experts.down_proj": "rowwise",
}

_SHARED_EXPERTS: Rows = {
    "layers.*.mlp.shared_experts.gate_proj": "colwise",
    "layers.*.mlp.shared_experts.up_proj": "colwise",
    "layers.*.mlp.shared_experts.down_proj": "rowwise",
}

_STREAMS: Rows = {"layers.*.attn_hc": STREAMS, "layers.*.ffn_hc": STREAMS, "hc_head": STREAMS}

_PER_LAYER_EMBEDDINGS: Rows = {
    # A table with a part for each layer, larger than the rest of a small model.
    "embed_tokens_per_layer": "embedding_colwise",
    "per_layer_model_projection": "colwise_gather_output",
    "layers.*.per_layer_input_gate": "replicate:few outputs, multiplied by whole activations",
    "layers.*.per_layer_projection": "replicate:few inputs, which are whole",
}

_INKLING_ATTENTION: Rows = {
    **_ATTENTION,
    "layers.*.self_attn": "divide:num_heads",
    "layers.*.self_attn.r_proj": "colwise:d_rel",
    "layers.*.self_attn.rel_logits_proj.proj": PER_HEAD,
    "layers.*.self_attn.k_sconv.conv1d": "local_params",
    "layers.*.self_attn.v_sconv.conv1d": "local_params",
    "layers.*.self_attn.k_sconv.conv1d.weight": "cut:0:~all/head_dim",
    "layers.*.self_attn.v_sconv.conv1d.weight": "cut:0:~all/head_dim",
}

_COUNTED_ATTENTION: Rows = {
    # It counts its heads.
    "": "divide:num_heads,num_key_value_heads",
    ".q_proj": "colwise:head_dim",
    ".k_proj": "kv_colwise:head_dim",
    ".v_proj": "kv_colwise:head_dim",
    ".o_proj": "rowwise",
}

_BLT_STACKS = ("local_encoder", "global_transformer", "local_decoder", "patcher")

_SIGLIP: Rows = {
    "vision_tower.embeddings.patch_embedding": "replicate:of pixels",
    "vision_tower.embeddings.position_embedding": POSITIONS,
    "vision_tower.encoder.layers.*.self_attn.q_proj": "colwise:head_dim",
    "vision_tower.encoder.layers.*.self_attn.k_proj": "colwise:head_dim",
    "vision_tower.encoder.layers.*.self_attn.v_proj": "colwise:head_dim",
    "vision_tower.encoder.layers.*.self_attn.out_proj": "rowwise",
    "vision_tower.encoder.layers.*.mlp.fc1": "colwise",
    "vision_tower.encoder.layers.*.mlp.fc2": "rowwise",
    "vision_tower.head.probe": "replicate:the pooling head, once after the layers",
    "vision_tower.head.attention": "replicate:the pooling head, once after the layers",
    "vision_tower.head.attention.out_proj": "replicate:the pooling head, once after the layers",
    "vision_tower.head.mlp.fc1": "colwise",
    "vision_tower.head.mlp.fc2": "rowwise",
}

PLANS: dict[str, Rows] = {
    "afmoe": {
        **_ATTENTION,
        **_QK_NORMS,
        **_MLP,
        **_SHARED_EXPERTS,
        "layers.*.self_attn.gate_proj": "colwise:head_dim",
        "layers.*.mlp.router.gate": ROUTER,
        "layers.*.mlp.expert_bias": "replicate",
    },
    "apertus": {"layers.*.mlp.act_fn": PER_HEAD},
    "axk1": {**_LATENT_ATTENTION, "layers.*.mlp.post_mlp_layernorm": "replicate"},
    "axk2": {
        **_LATENT_ATTENTION,
        **_INDEXER,
        "layers.*.self_attn.q_gate_proj": "colwise:qk_head_dim+v_head_dim",
        "layers.*.input_layernorm.mlp.fc1": "replicate:a norm's gate, of low rank",
        "layers.*.input_layernorm.mlp.fc2": "replicate:a norm's gate, of low rank",
        "layers.*.post_attention_layernorm.mlp.fc1": "replicate:a norm's gate, of low rank",
        "layers.*.post_attention_layernorm.mlp.fc2": "replicate:a norm's gate, of low rank",
    },
    "bitnet": {
        **_ATTENTION,
        **_MLP,
        "layers.*.self_attn.attn_sub_norm": "rms_norm",
        "layers.*.mlp.ffn_sub_norm": "rms_norm",
    },
    "blt": {
        **{
            f"{stack}.layers.*.self_attn{name}": text
            for stack in _BLT_STACKS
            for name, text in _COUNTED_ATTENTION.items()
        },
        **{
            f"{stack}.cross_attn_layers.*{name}": text
            for stack in ("local_encoder", "local_decoder")
            for name, text in _COUNTED_ATTENTION.items()
        },
        **{f"{stack}.{name}": text for stack in _BLT_STACKS for name, text in _MLP.items()},
        "local_encoder.cross_attn_layers.*.q_norm": "replicate",
        "local_encoder.cross_attn_layers.*.k_norm": "replicate",
        "local_decoder.cross_attn_layers.*.q_norm": "replicate",
        "local_decoder.cross_attn_layers.*.k_norm": "replicate",
        "local_encoder.embed_tokens": "embedding_colwise",
        "local_encoder.patch_embedding_projection": "colwise_gather_output",
        "global_transformer.token_embedding_projection": "colwise_gather_output",
        "local_decoder.patch_embedding_projection": "colwise_gather_output",
        # Embeddings of hashed groups of bytes, larger than the rest of the model.
        "encoder_hash_tok_embedding": "embedding_colwise",
        "patcher.embed_tokens": "embedding_colwise",
        "patcher.lm_head": "replicate:of few outputs",
    },
    "blt?tie_word_embeddings=True": {"local_encoder.embed_tokens": "embedding_rowwise"},
    "cohere2_moe": _SHARED_EXPERTS,
    "dbrx": {
        "blocks.*.norm_attn_norm.norm_1": "replicate",
        "blocks.*.norm_attn_norm.norm_2": "replicate",
        "blocks.*.norm_attn_norm.attn": "divide:hidden_size,num_key_value_heads",
        "blocks.*.norm_attn_norm.attn.Wqkv": "packed_colwise:hidden_size/head_dim,"
        "~num_key_value_heads*head_dim/head_dim,~num_key_value_heads*head_dim/head_dim",
        "blocks.*.norm_attn_norm.attn.out_proj": "rowwise",
        "blocks.*.ffn.router": ROUTER,
        "blocks.*.ffn.router.layer": ROUTER,
        "blocks.*.ffn.experts": "moe_tp_experts + divide:ffn_hidden_size",
        "blocks.*.ffn.experts.mlp.w1": "cut:0:each ffn_hidden_size",
        "blocks.*.ffn.experts.mlp.v1": "cut:0:each ffn_hidden_size",
        "blocks.*.ffn.experts.mlp.w2": "cut:0:each ffn_hidden_size",
    },
    "deepseek_v2": _LATENT_ATTENTION,
    "deepseek_v3": _LATENT_ATTENTION,
    "deepseek_v32": {**_LATENT_ATTENTION, **_INDEXER},
    "deepseek_v4": {
        **_SHARED_EXPERTS,
        **_STREAMS,
        "layers.*.self_attn": "divide:num_key_value_groups,config.o_groups",
        "layers.*.self_attn.q_a_proj": LATENT,
        "layers.*.self_attn.q_a_norm": "replicate",
        "layers.*.self_attn.q_b_proj": "colwise:head_dim",
        # One key and value head, which all query heads use, and its compressed past.
        "layers.*.self_attn.kv_proj": "replicate:one key and value head, used by all query heads",
        "layers.*.self_attn.kv_norm": "replicate + enter_output",
        "layers.*.self_attn.compressor": "enter_output",
        "layers.*.self_attn.compressor.position_bias": LATENT,
        "layers.*.self_attn.compressor.kv_proj": LATENT,
        "layers.*.self_attn.compressor.gate_proj": LATENT,
        "layers.*.self_attn.compressor.kv_norm": "replicate",
        "layers.*.self_attn.compressor.indexer.position_bias": INDEXER,
        "layers.*.self_attn.compressor.indexer.kv_proj": INDEXER,
        "layers.*.self_attn.compressor.indexer.gate_proj": INDEXER,
        "layers.*.self_attn.compressor.indexer.kv_norm": "replicate",
        "layers.*.self_attn.compressor.indexer.q_b_proj": INDEXER,
        "layers.*.self_attn.compressor.indexer.scorer.weights_proj": INDEXER,
        "layers.*.self_attn.sinks": "colwise",
        # One matrix for each group of heads; its input is cut already.
        "layers.*.self_attn.o_a_proj": "divide:n_groups",
        "layers.*.self_attn.o_a_proj.weight": "cut:0:all/o_lora_rank",
        "layers.*.self_attn.o_b_proj": "rowwise",
    },
    "diffllama": {
        **_MLP,
        # Head h works together with head h + half of them.
        "layers.*.self_attn.q_proj": "packed_colwise:2/head_dim",
        "layers.*.self_attn.k_proj": "packed_colwise:2/head_dim",
        "layers.*.self_attn.v_proj": "packed_colwise:2/head_dim",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.self_attn.lambda_q1": PER_HEAD,
        "layers.*.self_attn.lambda_k1": PER_HEAD,
        "layers.*.self_attn.lambda_q2": PER_HEAD,
        "layers.*.self_attn.lambda_k2": PER_HEAD,
    },
    "doge": {
        **_ATTENTION,
        **_QK_NORMS,
        "layers.*.input_residual": "replicate",
        "layers.*.post_attention_residual": "replicate",
        # Each key and value head has a mask, made of all of them, so ranks cannot share one.
        "layers.*.self_attn.k_proj": "colwise:head_dim",
        "layers.*.self_attn.v_proj": "colwise:head_dim",
        "layers.*.self_attn.dt_proj": "rowwise + split_output",
        "layers.*.self_attn.A": "colwise",
        "layers.*.mlp.router_gate": ROUTER,
    },
    "dots3_note_text": {
        **_LATENT_ATTENTION,
        **_INDEXER,
        "layers.*.self_attn.k_rope_only_layernorm": PER_HEAD,
    },
    "emu3_text_model": {**_ATTENTION, **_MLP},
    "ernie4_5_moe": {"layers.*.mlp.gate.moe_statics": ROUTER},
    "exaone_moe": _SHARED_EXPERTS,
    "flex_olmo": _WIDE_QK_NORMS,
    "flint": {**_ATTENTION, **_QK_NORMS, "layers.*.self_attn.sinks": "colwise"},
    "gemma3": {**_SIGLIP, "multi_modal_projector.mm_input_projection_weight": "replicate:one matrix after the tower"},
    "gemma3n_text": {
        **_PER_LAYER_EMBEDDINGS,
        # The activation is sparse: what passes depends on the mean and deviation of all gates.
        "layers.*.mlp.gate_proj": "colwise_gather_output",
        "layers.*.mlp.up_proj": "colwise_gather_output",
        "layers.*.mlp.down_proj": "rowwise_split_input",
        "layers.*.altup": STREAMS,
        "layers.*.altup.correction_coefs": STREAMS,
        "layers.*.altup.prediction_coefs": STREAMS,
        "layers.*.altup.modality_router": STREAMS,
        "layers.*.laurel.linear_left": "replicate:of low rank",
        "layers.*.laurel.linear_right": "replicate:of low rank",
        "altup_projections.*": "colwise_gather_output",
        "altup_unembed_projections.*": "colwise_gather_output",
    },
    "gemma4": {
        **{f"language_model.{name}": text for name, text in _PER_LAYER_EMBEDDINGS.items()},
        "language_model.layers.*.router.proj": ROUTER,
    },
    "gemma4_text": {**_PER_LAYER_EMBEDDINGS, "layers.*.router.proj": ROUTER},
    "glm": _PACKED_MLP,
    "glm4": _PACKED_MLP,
    "glm4_moe": _QK_NORMS,
    "glm4_moe_lite": {**_LATENT_ATTENTION, **_SHARED_EXPERTS},
    "glm_moe_dsa": {**_LATENT_ATTENTION, **_INDEXER},
    "gpt_oss": {
        **_ATTENTION,
        "layers.*.self_attn.sinks": "colwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        # The outputs are gate, up, gate, up, ...
        "layers.*.mlp.experts.gate_up_proj": "cut:2:all/2",
        "layers.*.mlp.experts.gate_up_proj_bias": "cut:1:all/2",
        "layers.*.mlp.experts.down_proj": "cut:1",
        "layers.*.mlp.experts.down_proj_bias": "first_rank",
    },
    "hunyuan_v1_dense": {
        **_ATTENTION,
        **_MLP,
        "layers.*.self_attn.query_layernorm": PER_HEAD,
        "layers.*.self_attn.key_layernorm": PER_HEAD,
    },
    "hunyuan_v1_moe": {
        **_ATTENTION,
        "layers.*.self_attn.query_layernorm": PER_HEAD,
        "layers.*.self_attn.key_layernorm": PER_HEAD,
        "layers.*.mlp.gate.wg": ROUTER,
        "layers.*.mlp.shared_mlp.gate_proj": "colwise",
        "layers.*.mlp.shared_mlp.up_proj": "colwise",
        "layers.*.mlp.shared_mlp.down_proj": "rowwise",
    },
    "hy_v4": {**_LATENT_ATTENTION, **_INDEXER, **_STREAMS, "layers.*.self_attn.gate_proj": "colwise:v_head_dim"},
    "inkling_text": {
        **_INKLING_ATTENTION,
        **_QK_NORMS,
        "embed_tokens.embed_norm": PER_HEAD,
        "layers.*.attn_sconv.conv1d": CONVOLUTION,
        "layers.*.mlp_sconv.conv1d": CONVOLUTION,
        "layers.*.mlp.global_scale": "replicate",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.shared_experts": "moe_tp_experts",
    },
    "inkling2_text": {
        **_INKLING_ATTENTION,
        "embed_tokens.embed_norm": PER_HEAD,
        "layers.*.attention_input.query": STREAMS,
        "layers.*.self_attn.gate_proj": "colwise:head_dim",
        "layers.*.self_attn.sink_proj": "colwise",
        "layers.*.self_attn.q_l2_clip.scale": "cut:0",
        "layers.*.self_attn.rel_l2_clip.scale": "cut:0",
        # Static taps for each channel, dynamic ones for each key and value head.
        "layers.*.self_attn.k_sconv": "divide:num_heads?",
        "layers.*.self_attn.v_sconv": "divide:num_heads?",
        "layers.*.self_attn.k_sconv.static_weight": "cut:1:~all/head_dim",
        "layers.*.self_attn.v_sconv.static_weight": "cut:1:~all/head_dim",
        "layers.*.self_attn.k_sconv.weight_proj": "kv_colwise:conv_kernel_size",
        "layers.*.self_attn.v_sconv.weight_proj": "kv_colwise:conv_kernel_size",
        "layers.*.post_attention_convolution.conv1d": CONVOLUTION,
        "layers.*.post_mlp_convolution.conv1d": CONVOLUTION,
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    },
    "llama4_text": {"model.layers.*.feed_forward.router": ROUTER},
    "longcat_flash": {
        "layers.*.mlp.router.classifier": ROUTER,
        **{name.replace("self_attn", "self_attn.*"): text for name, text in _LATENT_ATTENTION.items()},
    },
    "mimo_v2_flash": {"layers.*.self_attn.v_proj": "kv_colwise:v_head_dim"},
    "minicpm3": _LATENT_ATTENTION,
    "minimax_m2": _WIDE_QK_NORMS,
    "minimax_m3_vl_text": {
        **_ATTENTION,
        **_QK_NORMS,
        **_PACKED_MLP,
        "layers.*.mlp.shared_experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        # The indexer picks tokens for each key and value head, so ranks cannot share one.
        "layers.*.self_attn.indexer": "divide:num_heads,config.num_attention_heads",
        "layers.*.self_attn.indexer.q_proj": "colwise:index_head_dim",
        "layers.*.self_attn.indexer.k_proj": INDEXER,
        "layers.*.self_attn.indexer.q_norm": "replicate",
        "layers.*.self_attn.indexer.k_norm": "replicate",
    },
    "mllama_text_model": {
        **{
            f"model.layers.*.{attention}{name}": text
            for attention in ("self_attn", "cross_attn")
            for name, text in _COUNTED_ATTENTION.items()
        },
        **{f"model.{name}": text for name, text in _MLP.items()},
        "model.layers.*.cross_attn_attn_gate": "replicate",
        "model.layers.*.cross_attn_mlp_gate": "replicate",
        "model.layers.*.cross_attn.q_norm": PER_HEAD,
        "model.layers.*.cross_attn.k_norm": PER_HEAD,
    },
    "olmo2": _WIDE_QK_NORMS,
    "olmo3": _WIDE_QK_NORMS,
    "olmoe": _WIDE_QK_NORMS,
    "phi3": {**_PACKED_ATTENTION, **_PACKED_MLP},
    "phi4_multimodal": {**_PACKED_ATTENTION, **_PACKED_MLP},
    "phimoe": _ATTENTION,
    "qwen2_moe": {
        "layers.*.mlp.shared_expert.gate_proj": "colwise",
        "layers.*.mlp.shared_expert.up_proj": "colwise",
        "layers.*.mlp.shared_expert.down_proj": "rowwise",
    },
    "solar_open": _SHARED_EXPERTS,
    "youtu": _LATENT_ATTENTION,
    "zaya": {
        **_EXPERTS,
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.self_attn.qk_norm.temp": "colwise",
        # The first half of the value heads comes from one projection, the second from another.
        "layers.*.self_attn.qkv_proj": "divide:num_key_value_heads,num_attention_heads + split_output:2:2",
        "layers.*.self_attn.qkv_proj.q_proj": "colwise:head_dim",
        "layers.*.self_attn.qkv_proj.k_proj": "colwise:head_dim",
        "layers.*.self_attn.qkv_proj.v_proj_current": "colwise_gather_output",
        "layers.*.self_attn.qkv_proj.v_proj_delayed": "colwise_gather_output",
        "layers.*.self_attn.qkv_proj.conv_qk_depthwise": "local_params",
        "layers.*.self_attn.qkv_proj.conv_qk_grouped": "local_params",
        **{
            f"layers.*.self_attn.qkv_proj.{conv}.{part}": "cut:0:num_attention_heads*head_dim/head_dim,"
            "num_key_value_heads*head_dim/head_dim"
            for conv in ("conv_qk_depthwise", "conv_qk_grouped")
            for part in ("weight", "bias")
        },
        "layers.*.mlp.gate.down_proj": ROUTER,
        "layers.*.mlp.gate.router_states_scale": "replicate",
        "layers.*.mlp.gate.router_mlp.norm": "replicate",
        "layers.*.mlp.gate.router_mlp.fc1": ROUTER,
        "layers.*.mlp.gate.router_mlp.fc2": ROUTER,
        "layers.*.mlp.gate.router_mlp.out_proj": ROUTER,
    },
}
"""Tensor plans that Hugging Face lacks, has wrong, or leaves without the weights that stay whole. Dictionaries only.

Names and words are those of `trainer.tensor_parallel.plan`; names count from the base model. A row here overrides
Hugging Face's row of the same name; None takes Hugging Face's row away. A new family is one dictionary here and one row
in the table of families.
"""
