"""Decoder families with attention in every layer."""

from __future__ import annotations

from trainer.tensor_parallel.families.common import POSITIONS, Rows

_GPT2: Rows = {
    "wpe": POSITIONS,
    "h.*.attn": "divide:num_heads,embed_dim,split_size",
    "h.*.attn.c_attn": "packed_colwise:3/head_dim",
    "h.*.attn.c_proj": "rowwise",
    "h.*.crossattention": "divide:num_heads,embed_dim,split_size",
    "h.*.crossattention.c_attn": "packed_colwise:2/head_dim",
    "h.*.crossattention.q_attn": "colwise:head_dim",
    "h.*.crossattention.c_proj": "rowwise",
    "h.*.mlp.c_fc": "colwise",
    "h.*.mlp.c_proj": "rowwise",
}

_SEPARATE_QKV: Rows = {
    "layers.*.self_attn.q_proj": "colwise:head_dim",
    "layers.*.self_attn.k_proj": "kv_colwise:head_dim",
    "layers.*.self_attn.v_proj": "kv_colwise:head_dim",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}

_NEOX: Rows = {
    # One matrix, the query, key and value of a head side by side.
    "layers.*.attention": "divide:num_attention_heads,hidden_size",
    "layers.*.attention.query_key_value": "colwise:3*head_size",
    "layers.*.attention.dense": "rowwise",
    "layers.*.mlp.dense_h_to_4h": "colwise",
    "layers.*.mlp.dense_4h_to_h": "rowwise",
}

_PERSIMMON: Rows = {
    "layers.*.self_attn": "divide:num_heads",
    "layers.*.self_attn.query_key_value": "colwise:3*head_dim",
    "layers.*.self_attn.dense": "rowwise",
    "layers.*.self_attn.q_layernorm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.k_layernorm": "replicated_with_grad_allreduce",
    "layers.*.mlp.dense_h_to_4h": "colwise",
    "layers.*.mlp.dense_4h_to_h": "rowwise",
}

_ALIBI = "split_input:alibi:1 + split_input:attention_mask:1"

_FALCON_PAIR = "parallel_residual:self_attention.dense,mlp.dense_4h_to_h"
_NEOX_PAIR: Rows = {
    "layers.*": "parallel_residual:attention.dense,mlp.dense_4h_to_h",
    # A norm for each branch: both read the block's input, which enters once, before them.
    "layers.*.input_layernorm": "enter_through + replicated_with_grad_allreduce",
    "layers.*.post_attention_layernorm": "enter_through + replicated_with_grad_allreduce",
    "layers.*.attention.query_key_value": "colwise:3*head_size + inside",
    "layers.*.mlp.dense_h_to_4h": "colwise + inside",
}
_COHERE: Rows = {
    "layers.*": "parallel_residual:self_attn.o_proj,mlp.down_proj",
    # A row of weights for each head.
    "layers.*.self_attn.q_norm.weight": "cut:0",
    "layers.*.self_attn.k_norm.weight": "cut:0:~all/1",
}

PLANS: dict[str, Rows] = {
    "bloom": {
        "h.*.self_attention": "divide:num_heads,hidden_size + split_input:alibi:0:num_heads",
        "h.*.self_attention.query_key_value": "colwise:3*head_dim",
        "h.*.self_attention.dense": "rowwise",
        "h.*.mlp.dense_h_to_4h": "colwise",
        "h.*.mlp.dense_4h_to_h": "rowwise",
    },
    "codegen": {
        # Four blocks of heads, each query | value | key: every rank takes its share of each block.
        "h.*.attn": "divide:num_attention_heads",
        "h.*.attn.qkv_proj": "packed_colwise:12/head_dim",
        "h.*.attn.out_proj": "packed_rowwise:4/head_dim",
        "h.*.mlp.fc_in": "colwise",
        "h.*.mlp.fc_out": "rowwise",
        "h.*": "parallel_residual:attn.out_proj,mlp.fc_out",
    },
    "falcon": {
        "h.*.self_attention": f"divide:num_heads,hidden_size,split_size + {_ALIBI}",
        "h.*.self_attention.query_key_value": "packed_colwise:hidden_size/head_dim,~2*head_dim/2*head_dim",
        "h.*.self_attention.dense": "rowwise",
        "h.*.mlp.dense_h_to_4h": "colwise",
        "h.*.mlp.dense_4h_to_h": "rowwise",
    },
    "falcon?parallel_attn=True": {"h.*": _FALCON_PAIR},
    "falcon?multi_query=False": {
        "h.*.self_attention": f"divide:num_heads,num_kv_heads,hidden_size,split_size + {_ALIBI}",
        "h.*.self_attention.query_key_value": "colwise:3*head_dim",
    },
    "falcon?new_decoder_architecture=True": {
        # A group holds its query heads, its key and its value.
        "h.*.self_attention": f"divide:num_heads,num_kv_heads,hidden_size,split_size + {_ALIBI}",
        "h.*": _FALCON_PAIR,
        "h.*.ln_attn": "enter_through + replicated_with_grad_allreduce",
        "h.*.ln_mlp": "enter_through + replicated_with_grad_allreduce",
        "h.*.self_attention.query_key_value": "colwise:num_heads//num_kv_heads*head_dim+2*head_dim + inside",
        "h.*.mlp.dense_h_to_4h": "colwise + inside",
    },
    "falcon?new_decoder_architecture=True&num_ln_in_parallel_attn=1": {
        # One norm for both branches: its output enters.
        "h.*.self_attention.query_key_value": "colwise:num_heads//num_kv_heads*head_dim+2*head_dim",
        "h.*.mlp.dense_h_to_4h": "colwise",
    },
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "gpt_neox?use_parallel_residual=True": _NEOX_PAIR,
    "phi": {
        "layers.*": "parallel_residual:self_attn.dense,mlp.fc2",
        "layers.*.self_attn.q_layernorm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_layernorm": "replicated_with_grad_allreduce",
    },
    "stablelm?use_parallel_residual=True": {"layers.*": "parallel_residual:self_attn.o_proj,mlp.down_proj"},
    "fuyu": {
        **{f"language_model.{name}": style for name, style in _PERSIMMON.items()},
        "vision_embed_tokens": "replicate:image patches, joined with whole activations",
    },
    "gpt2": _GPT2,
    "gpt-sw3": _GPT2,
    "gpt_bigcode": {
        **_GPT2,
        # All query heads, then one key and one value that every rank holds.
        "h.*.attn": "divide:num_heads,embed_dim",
        "h.*.attn.c_attn": "packed_colwise:embed_dim/head_dim,~kv_dim/head_dim,~kv_dim/head_dim",
    },
    "gpt_bigcode?multi_query=False": {
        "h.*.attn": "divide:num_heads,embed_dim,kv_heads,kv_dim",
        "h.*.attn.c_attn": "colwise:3*head_dim",
    },
    "gpt_neo": {
        "wpe": POSITIONS,
        "h.*.attn.attention": "divide:num_heads,embed_dim",
        "h.*.attn.attention.q_proj": "colwise:head_dim",
        "h.*.attn.attention.k_proj": "colwise:head_dim",
        "h.*.attn.attention.v_proj": "colwise:head_dim",
        "h.*.attn.attention.out_proj": "rowwise",
        "h.*.mlp.c_fc": "colwise",
        "h.*.mlp.c_proj": "rowwise",
    },
    "gpt_neox_japanese": {
        **_NEOX,
        "layers.*.attention.dense_bias": "replicate:added after the sum",
    },
    "gptj": {
        "h.*.attn": "divide:num_attention_heads,embed_dim",
        "h.*.attn.q_proj": "colwise:head_dim",
        "h.*.attn.k_proj": "colwise:head_dim",
        "h.*.attn.v_proj": "colwise:head_dim",
        "h.*.attn.out_proj": "rowwise",
        "h.*.mlp.fc_in": "colwise",
        "h.*.mlp.fc_out": "rowwise",
        "h.*": "parallel_residual:attn.out_proj,mlp.fc_out",
    },
    "mpt": {
        "blocks.*.attn": "divide:n_heads + split_input:position_bias:0",
        "blocks.*.attn.Wqkv": "packed_colwise:3/head_dim",
        "blocks.*.attn.out_proj": "rowwise",
        "blocks.*.ffn.up_proj": "colwise",
        "blocks.*.ffn.down_proj": "rowwise",
    },
    "openai-gpt": {
        "positions_embed": POSITIONS,
        "h.*.attn": "divide:n_head,split_size",
        "h.*.attn.c_attn": "packed_colwise:3/split_size//n_head",
        "h.*.attn.c_proj": "rowwise",
        "h.*.mlp.c_fc": "colwise",
        "h.*.mlp.c_proj": "rowwise",
    },
    "opt": {
        "decoder.embed_positions": POSITIONS,
        "decoder.project_in": "replicate:between embedding and blocks",
        "decoder.project_out": "replicate:between blocks and head",
        "decoder.layers.*.self_attn": "divide:num_heads,embed_dim",
        "decoder.layers.*.self_attn.q_proj": "colwise:head_dim",
        "decoder.layers.*.self_attn.k_proj": "colwise:head_dim",
        "decoder.layers.*.self_attn.v_proj": "colwise:head_dim",
        "decoder.layers.*.self_attn.out_proj": "rowwise",
        "decoder.layers.*.fc1": "colwise",
        "decoder.layers.*.fc2": "rowwise",
    },
    "persimmon": _PERSIMMON,
    "stablelm": {
        **_SEPARATE_QKV,
        "layers.*.self_attn": "divide:num_heads,num_key_value_heads,hidden_size",
        "layers.*.self_attn.q_layernorm": "per_head_norms",
        "layers.*.self_attn.k_layernorm": "per_head_norms",
        "layers.*.self_attn.q_layernorm.norms.*": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_layernorm.norms.*": "replicated_with_grad_allreduce",
    },
}
