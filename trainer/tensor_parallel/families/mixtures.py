"""Mixtures of experts, and other families whose layers differ."""

from __future__ import annotations

from trainer.tensor_parallel.families.common import (
    ATTENTION,
    INDEXER,
    PER_HEAD,
    POSITIONS,
    ROUTER,
    SHARED_EXPERTS,
    Entries,
    Variant,
)
from trainer.tensor_parallel.styles import (
    Attribute,
    Column,
    ColumnGatherOutput,
    Divide,
    EmbeddingColumn,
    Experts,
    FirstRankOnly,
    KeyValueColumn,
    LocalParameters,
    PackedColumn,
    Part,
    Replicated,
    RMSNorm,
    Row,
    RowSplitInput,
    ShardedParameter,
    SplitOutput,
    VocabularyEmbedding,
)

STREAMS = Replicated("it mixes the residual streams, which are full")

CONVOLUTION = Replicated("a short convolution of full activations")

_QK_NORMS: Entries = {"layers.*.self_attn.q_norm": PER_HEAD, "layers.*.self_attn.k_norm": PER_HEAD}

_WIDE_QK_NORMS: Entries = {
    # The norms sum over all heads; the weight of a key head that ranks share is shared with it.
    **ATTENTION,
    "layers.*.self_attn.q_norm": RMSNorm(unit="head_dim"),
    "layers.*.self_attn.k_norm": RMSNorm(parts=(Part(unit="head_dim", shared=True),)),
}

_MLP: Entries = {
    "layers.*.mlp.gate_proj": Column(),
    "layers.*.mlp.up_proj": Column(),
    "layers.*.mlp.down_proj": Row(),
}

_PACKED_MLP: Entries = {"layers.*.mlp.gate_up_proj": PackedColumn(), "layers.*.mlp.down_proj": Row()}

_PACKED_ATTENTION: Entries = {
    # Where q ends is computed from the configuration.
    "layers.*.self_attn": Divide(Attribute("num_attention_heads", in_config=True), "num_key_value_heads"),
    "layers.*.self_attn.qkv_proj": PackedColumn(
        parts=(
            Part("num_attention_heads*head_dim", unit="head_dim"),
            Part("num_key_value_heads*head_dim", unit="head_dim", shared=True),
            Part("num_key_value_heads*head_dim", unit="head_dim", shared=True),
        )
    ),
    "layers.*.self_attn.o_proj": Row(),
}

_EXPERTS: Entries = {
    "layers.*.mlp.experts": Experts(),
    "layers.*.mlp.experts.gate_up_proj": PackedColumn(),
    "layers.*.mlp.experts.down_proj": Row(),
}

_PER_LAYER_EMBEDDINGS: Entries = {
    # A table with a part for each layer, larger than the rest of a small model.
    "embed_tokens_per_layer": EmbeddingColumn(),
    "per_layer_model_projection": ColumnGatherOutput(),
    "layers.*.per_layer_input_gate": Replicated("few outputs, multiplied by full activations"),
    "layers.*.per_layer_projection": Replicated("few inputs, which are full"),
}

_INKLING_ATTENTION: Entries = {
    **ATTENTION,
    "layers.*.self_attn": Divide("num_heads"),
    "layers.*.self_attn.r_proj": Column(unit="d_rel"),
    "layers.*.self_attn.rel_logits_proj.proj": PER_HEAD,
    "layers.*.self_attn.k_sconv.conv1d": LocalParameters(),
    "layers.*.self_attn.v_sconv.conv1d": LocalParameters(),
    "layers.*.self_attn.k_sconv.conv1d.weight": ShardedParameter(dim=0, parts=(Part(unit="head_dim", shared=True),)),
    "layers.*.self_attn.v_sconv.conv1d.weight": ShardedParameter(dim=0, parts=(Part(unit="head_dim", shared=True),)),
}

_COUNTED_ATTENTION: Entries = {
    # It keeps the numbers of its heads.
    "": Divide("num_heads", "num_key_value_heads"),
    ".q_proj": Column(unit="head_dim"),
    ".k_proj": KeyValueColumn(unit="head_dim"),
    ".v_proj": KeyValueColumn(unit="head_dim"),
    ".o_proj": Row(),
}

_BLT_STACKS = ("local_encoder", "global_transformer", "local_decoder", "patcher")

_SIGLIP: Entries = {
    "vision_tower.embeddings.patch_embedding": Replicated("of pixels"),
    "vision_tower.embeddings.position_embedding": POSITIONS,
    "vision_tower.encoder.layers.*.self_attn.q_proj": Column(unit="head_dim"),
    "vision_tower.encoder.layers.*.self_attn.k_proj": Column(unit="head_dim"),
    "vision_tower.encoder.layers.*.self_attn.v_proj": Column(unit="head_dim"),
    "vision_tower.encoder.layers.*.self_attn.out_proj": Row(),
    "vision_tower.encoder.layers.*.mlp.fc1": Column(),
    "vision_tower.encoder.layers.*.mlp.fc2": Row(),
    "vision_tower.head.probe": Replicated("the pooling head, once after the layers"),
    "vision_tower.head.attention": Replicated("the pooling head, once after the layers"),
    "vision_tower.head.attention.out_proj": Replicated("the pooling head, once after the layers"),
    "vision_tower.head.mlp.fc1": Column(),
    "vision_tower.head.mlp.fc2": Row(),
}


PLANS: dict[str, Entries] = {
    "afmoe": {
        **ATTENTION,
        **_QK_NORMS,
        **_MLP,
        **SHARED_EXPERTS,
        "layers.*.self_attn.gate_proj": Column(unit="head_dim"),
        "layers.*.mlp.router.gate": ROUTER,
        "layers.*.mlp.expert_bias": Replicated(),
    },
    "apertus": {"layers.*.mlp.act_fn": PER_HEAD},
    "bitnet": {
        **ATTENTION,
        **_MLP,
        "layers.*.self_attn.attn_sub_norm": RMSNorm(),
        "layers.*.mlp.ffn_sub_norm": RMSNorm(),
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
        "local_encoder.cross_attn_layers.*.q_norm": Replicated(),
        "local_encoder.cross_attn_layers.*.k_norm": Replicated(),
        "local_decoder.cross_attn_layers.*.q_norm": Replicated(),
        "local_decoder.cross_attn_layers.*.k_norm": Replicated(),
        "local_encoder.embed_tokens": EmbeddingColumn(),
        "local_encoder.patch_embedding_projection": ColumnGatherOutput(),
        "global_transformer.token_embedding_projection": ColumnGatherOutput(),
        "local_decoder.patch_embedding_projection": ColumnGatherOutput(),
        # Embeddings of hashed groups of bytes, larger than the rest of the model.
        "encoder_hash_tok_embedding": EmbeddingColumn(),
        "patcher.embed_tokens": EmbeddingColumn(),
        "patcher.lm_head": Replicated("of few outputs"),
    },
    "cohere2_moe": SHARED_EXPERTS,
    "dbrx": {
        "blocks.*.norm_attn_norm.norm_1": Replicated(),
        "blocks.*.norm_attn_norm.norm_2": Replicated(),
        "blocks.*.norm_attn_norm.attn": Divide("hidden_size", "num_key_value_heads"),
        "blocks.*.norm_attn_norm.attn.Wqkv": PackedColumn(
            parts=(
                Part("hidden_size", unit="head_dim"),
                Part("num_key_value_heads*head_dim", unit="head_dim", shared=True),
                Part("num_key_value_heads*head_dim", unit="head_dim", shared=True),
            )
        ),
        "blocks.*.norm_attn_norm.attn.out_proj": Row(),
        "blocks.*.ffn.router": ROUTER,
        "blocks.*.ffn.router.layer": ROUTER,
        "blocks.*.ffn.experts": (Experts(), Divide("ffn_hidden_size")),
        "blocks.*.ffn.experts.mlp.w1": ShardedParameter(dim=0, each="ffn_hidden_size"),
        "blocks.*.ffn.experts.mlp.v1": ShardedParameter(dim=0, each="ffn_hidden_size"),
        "blocks.*.ffn.experts.mlp.w2": ShardedParameter(dim=0, each="ffn_hidden_size"),
    },
    "diffllama": {
        **_MLP,
        # Head h works together with head h + half of them.
        "layers.*.self_attn.q_proj": PackedColumn(unit="head_dim"),
        "layers.*.self_attn.k_proj": PackedColumn(unit="head_dim"),
        "layers.*.self_attn.v_proj": PackedColumn(unit="head_dim"),
        "layers.*.self_attn.o_proj": Row(),
        "layers.*.self_attn.lambda_q1": PER_HEAD,
        "layers.*.self_attn.lambda_k1": PER_HEAD,
        "layers.*.self_attn.lambda_q2": PER_HEAD,
        "layers.*.self_attn.lambda_k2": PER_HEAD,
    },
    "doge": {
        **ATTENTION,
        **_QK_NORMS,
        "layers.*.input_residual": Replicated(),
        "layers.*.post_attention_residual": Replicated(),
        # Each key and value head has a mask, made of all of them, so ranks cannot share one.
        "layers.*.self_attn.k_proj": Column(unit="head_dim"),
        "layers.*.self_attn.v_proj": Column(unit="head_dim"),
        "layers.*.self_attn.dt_proj": (Row(), SplitOutput()),
        "layers.*.self_attn.A": Column(),
        "layers.*.mlp.router_gate": ROUTER,
    },
    "emu3_text_model": {**ATTENTION, **_MLP},
    "ernie4_5_moe": {"layers.*.mlp.gate.moe_statics": ROUTER},
    "exaone_moe": SHARED_EXPERTS,
    "flex_olmo": _WIDE_QK_NORMS,
    "flint": {**ATTENTION, **_QK_NORMS, "layers.*.self_attn.sinks": Column()},
    "gemma3": {**_SIGLIP, "multi_modal_projector.mm_input_projection_weight": Replicated("one matrix after the tower")},
    "gemma3n_text": {
        **_PER_LAYER_EMBEDDINGS,
        # The activation is sparse: what passes depends on the mean and deviation of all gates.
        "layers.*.mlp.gate_proj": ColumnGatherOutput(),
        "layers.*.mlp.up_proj": ColumnGatherOutput(),
        "layers.*.mlp.down_proj": RowSplitInput(),
        "layers.*.altup": STREAMS,
        "layers.*.altup.correction_coefs": STREAMS,
        "layers.*.altup.prediction_coefs": STREAMS,
        "layers.*.altup.modality_router": STREAMS,
        "layers.*.laurel.linear_left": Replicated("of low rank"),
        "layers.*.laurel.linear_right": Replicated("of low rank"),
        "altup_projections.*": ColumnGatherOutput(),
        "altup_unembed_projections.*": ColumnGatherOutput(),
    },
    "gemma4": {
        **{f"language_model.{name}": text for name, text in _PER_LAYER_EMBEDDINGS.items()},
        "language_model.layers.*.router.proj": ROUTER,
    },
    "gemma4_text": {**_PER_LAYER_EMBEDDINGS, "layers.*.router.proj": ROUTER},
    "glm": _PACKED_MLP,
    "glm4": _PACKED_MLP,
    "glm4_moe": _QK_NORMS,
    "gpt_oss": {
        **ATTENTION,
        "layers.*.self_attn.sinks": Column(),
        "layers.*.mlp.experts": Experts(),
        # The outputs are gate, up, gate, up, ...
        "layers.*.mlp.experts.gate_up_proj": ShardedParameter(dim=2, unit="2"),
        "layers.*.mlp.experts.gate_up_proj_bias": ShardedParameter(dim=1, unit="2"),
        "layers.*.mlp.experts.down_proj": ShardedParameter(dim=1),
        "layers.*.mlp.experts.down_proj_bias": FirstRankOnly(),
    },
    "hunyuan_v1_dense": {
        **ATTENTION,
        **_MLP,
        "layers.*.self_attn.query_layernorm": PER_HEAD,
        "layers.*.self_attn.key_layernorm": PER_HEAD,
    },
    "hunyuan_v1_moe": {
        **ATTENTION,
        "layers.*.self_attn.query_layernorm": PER_HEAD,
        "layers.*.self_attn.key_layernorm": PER_HEAD,
        "layers.*.mlp.gate.wg": ROUTER,
        "layers.*.mlp.shared_mlp.gate_proj": Column(),
        "layers.*.mlp.shared_mlp.up_proj": Column(),
        "layers.*.mlp.shared_mlp.down_proj": Row(),
    },
    "inkling_text": {
        **_INKLING_ATTENTION,
        **_QK_NORMS,
        "embed_tokens.embed_norm": PER_HEAD,
        "layers.*.attn_sconv.conv1d": CONVOLUTION,
        "layers.*.mlp_sconv.conv1d": CONVOLUTION,
        "layers.*.mlp.global_scale": Replicated(),
        "layers.*.mlp.experts.gate_up_proj": PackedColumn(),
        "layers.*.mlp.shared_experts": Experts(),
    },
    "inkling2_text": {
        **_INKLING_ATTENTION,
        "embed_tokens.embed_norm": PER_HEAD,
        "layers.*.attention_input.query": STREAMS,
        "layers.*.self_attn.gate_proj": Column(unit="head_dim"),
        "layers.*.self_attn.sink_proj": Column(),
        "layers.*.self_attn.q_l2_clip.scale": ShardedParameter(dim=0),
        "layers.*.self_attn.rel_l2_clip.scale": ShardedParameter(dim=0),
        # Static taps for each channel, dynamic ones for each key and value head.
        "layers.*.self_attn.k_sconv": Divide(Attribute("num_heads", optional=True)),
        "layers.*.self_attn.v_sconv": Divide(Attribute("num_heads", optional=True)),
        "layers.*.self_attn.k_sconv.static_weight": ShardedParameter(
            dim=1, parts=(Part(unit="head_dim", shared=True),)
        ),
        "layers.*.self_attn.v_sconv.static_weight": ShardedParameter(
            dim=1, parts=(Part(unit="head_dim", shared=True),)
        ),
        "layers.*.self_attn.k_sconv.weight_proj": KeyValueColumn(unit="conv_kernel_size"),
        "layers.*.self_attn.v_sconv.weight_proj": KeyValueColumn(unit="conv_kernel_size"),
        "layers.*.post_attention_convolution.conv1d": CONVOLUTION,
        "layers.*.post_mlp_convolution.conv1d": CONVOLUTION,
        "layers.*.mlp.experts.gate_up_proj": PackedColumn(),
    },
    "llama4_text": {"model.layers.*.feed_forward.router": ROUTER},
    "mimo_v2_flash": {"layers.*.self_attn.v_proj": KeyValueColumn(unit="v_head_dim")},
    "minimax_m2": _WIDE_QK_NORMS,
    "minimax_m3_vl_text": {
        **ATTENTION,
        **_QK_NORMS,
        **_PACKED_MLP,
        "layers.*.mlp.shared_experts.gate_up_proj": PackedColumn(),
        "layers.*.mlp.shared_experts.down_proj": Row(),
        # The indexer picks tokens for each key and value head, so ranks cannot share one.
        "layers.*.self_attn.indexer": Divide("num_heads", Attribute("num_attention_heads", in_config=True)),
        "layers.*.self_attn.indexer.q_proj": Column(unit="index_head_dim"),
        "layers.*.self_attn.indexer.k_proj": INDEXER,
        "layers.*.self_attn.indexer.q_norm": Replicated(),
        "layers.*.self_attn.indexer.k_norm": Replicated(),
    },
    "mllama_text_model": {
        **{
            f"model.layers.*.{attention}{name}": text
            for attention in ("self_attn", "cross_attn")
            for name, text in _COUNTED_ATTENTION.items()
        },
        **{f"model.{name}": text for name, text in _MLP.items()},
        "model.layers.*.cross_attn_attn_gate": Replicated(),
        "model.layers.*.cross_attn_mlp_gate": Replicated(),
        "model.layers.*.cross_attn.q_norm": PER_HEAD,
        "model.layers.*.cross_attn.k_norm": PER_HEAD,
    },
    "olmo2": _WIDE_QK_NORMS,
    "olmo3": _WIDE_QK_NORMS,
    "olmoe": _WIDE_QK_NORMS,
    "phi3": {**_PACKED_ATTENTION, **_PACKED_MLP},
    "phi4_multimodal": {**_PACKED_ATTENTION, **_PACKED_MLP},
    "phimoe": ATTENTION,
    "qwen2_moe": {
        "layers.*.mlp.shared_expert.gate_proj": Column(),
        "layers.*.mlp.shared_expert.up_proj": Column(),
        "layers.*.mlp.shared_expert.down_proj": Row(),
    },
    "solar_open": SHARED_EXPERTS,
    "zaya": {
        **_EXPERTS,
        "layers.*.self_attn.o_proj": Row(),
        "layers.*.self_attn.qk_norm.temp": Column(),
        # The first half of the value heads comes from one projection, the second from another.
        "layers.*.self_attn.qkv_proj": (Divide("num_key_value_heads", "num_attention_heads"), SplitOutput(2, 2)),
        "layers.*.self_attn.qkv_proj.q_proj": Column(unit="head_dim"),
        "layers.*.self_attn.qkv_proj.k_proj": Column(unit="head_dim"),
        "layers.*.self_attn.qkv_proj.v_proj_current": ColumnGatherOutput(),
        "layers.*.self_attn.qkv_proj.v_proj_delayed": ColumnGatherOutput(),
        "layers.*.self_attn.qkv_proj.conv_qk_depthwise": LocalParameters(),
        "layers.*.self_attn.qkv_proj.conv_qk_grouped": LocalParameters(),
        **{
            f"layers.*.self_attn.qkv_proj.{conv}.{part}": ShardedParameter(
                dim=0,
                parts=(
                    Part("num_attention_heads*head_dim", unit="head_dim"),
                    Part("num_key_value_heads*head_dim", unit="head_dim"),
                ),
            )
            for conv in ("conv_qk_depthwise", "conv_qk_grouped")
            for part in ("weight", "bias")
        },
        "layers.*.mlp.gate.down_proj": ROUTER,
        "layers.*.mlp.gate.router_states_scale": Replicated(),
        "layers.*.mlp.gate.router_mlp.norm": Replicated(),
        "layers.*.mlp.gate.router_mlp.fc1": ROUTER,
        "layers.*.mlp.gate.router_mlp.fc2": ROUTER,
        "layers.*.mlp.gate.router_mlp.out_proj": ROUTER,
    },
}

VARIANTS = [
    Variant("blt", {"tie_word_embeddings": True}, {"local_encoder.embed_tokens": VocabularyEmbedding()}),
]
