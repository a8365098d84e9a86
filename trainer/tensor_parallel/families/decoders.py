"""Decoder families with attention in every layer."""

from __future__ import annotations

from trainer.tensor_parallel.families.common import POSITIONS, Entries, Variant
from trainer.tensor_parallel.styles import (
    Column,
    Divide,
    EnterThrough,
    InsideRegion,
    KeyValueColumn,
    PackedColumn,
    PackedRow,
    ParallelResidual,
    Part,
    PerHeadNorms,
    Replicated,
    ReplicatedSumGradient,
    Row,
    ShardedParameter,
    SplitInput,
)

_GPT2: Entries = {
    "wpe": POSITIONS,
    "h.*.attn": Divide("num_heads", "embed_dim", "split_size"),
    "h.*.attn.c_attn": PackedColumn(count=3, unit="head_dim"),
    "h.*.attn.c_proj": Row(),
    "h.*.crossattention": Divide("num_heads", "embed_dim", "split_size"),
    "h.*.crossattention.c_attn": PackedColumn(unit="head_dim"),
    "h.*.crossattention.q_attn": Column(unit="head_dim"),
    "h.*.crossattention.c_proj": Row(),
    "h.*.mlp.c_fc": Column(),
    "h.*.mlp.c_proj": Row(),
}

_SEPARATE_QKV: Entries = {
    "layers.*.self_attn.q_proj": Column(unit="head_dim"),
    "layers.*.self_attn.k_proj": KeyValueColumn(unit="head_dim"),
    "layers.*.self_attn.v_proj": KeyValueColumn(unit="head_dim"),
    "layers.*.self_attn.o_proj": Row(),
    "layers.*.mlp.gate_proj": Column(),
    "layers.*.mlp.up_proj": Column(),
    "layers.*.mlp.down_proj": Row(),
}

_NEOX: Entries = {
    # One matrix, the query, key and value of each head next to each other.
    "layers.*.attention": Divide("num_attention_heads", "hidden_size"),
    "layers.*.attention.query_key_value": Column(unit="3*head_size"),
    "layers.*.attention.dense": Row(),
    "layers.*.mlp.dense_h_to_4h": Column(),
    "layers.*.mlp.dense_4h_to_h": Row(),
}

_PERSIMMON: Entries = {
    "layers.*.self_attn": Divide("num_heads"),
    "layers.*.self_attn.query_key_value": Column(unit="3*head_dim"),
    "layers.*.self_attn.dense": Row(),
    "layers.*.self_attn.q_layernorm": ReplicatedSumGradient(),
    "layers.*.self_attn.k_layernorm": ReplicatedSumGradient(),
    "layers.*.mlp.dense_h_to_4h": Column(),
    "layers.*.mlp.dense_4h_to_h": Row(),
}

_ALIBI = (SplitInput("alibi", 1), SplitInput("attention_mask", 1))

_FALCON_PAIR = ParallelResidual("self_attention.dense", "mlp.dense_4h_to_h")
_NEOX_PAIR: Entries = {
    "layers.*": ParallelResidual("attention.dense", "mlp.dense_4h_to_h"),
    # A norm for each branch: both read the block's input, which enters once, before them.
    "layers.*.input_layernorm": (EnterThrough(), ReplicatedSumGradient()),
    "layers.*.post_attention_layernorm": (EnterThrough(), ReplicatedSumGradient()),
    "layers.*.attention.query_key_value": (Column(unit="3*head_size"), InsideRegion()),
    "layers.*.mlp.dense_h_to_4h": (Column(), InsideRegion()),
}
_COHERE: Entries = {
    "layers.*": ParallelResidual("self_attn.o_proj", "mlp.down_proj"),
    # A row of weights for each head.
    "layers.*.self_attn.q_norm.weight": ShardedParameter(dim=0),
    "layers.*.self_attn.k_norm.weight": ShardedParameter(dim=0, parts=(Part(unit="1", shared=True),)),
}

PLANS: dict[str, Entries] = {
    "bloom": {
        "h.*.self_attention": (Divide("num_heads", "hidden_size"), SplitInput("alibi", 0, "num_heads")),
        "h.*.self_attention.query_key_value": Column(unit="3*head_dim"),
        "h.*.self_attention.dense": Row(),
        "h.*.mlp.dense_h_to_4h": Column(),
        "h.*.mlp.dense_4h_to_h": Row(),
    },
    "codegen": {
        # Four blocks of heads, each query | value | key: every rank takes its share of each block.
        "h.*.attn": Divide("num_attention_heads"),
        "h.*.attn.qkv_proj": PackedColumn(count=12, unit="head_dim"),
        "h.*.attn.out_proj": PackedRow(count=4, unit="head_dim"),
        "h.*.mlp.fc_in": Column(),
        "h.*.mlp.fc_out": Row(),
        "h.*": ParallelResidual("attn.out_proj", "mlp.fc_out"),
    },
    "falcon": {
        "h.*.self_attention": (Divide("num_heads", "hidden_size", "split_size"), *_ALIBI),
        "h.*.self_attention.query_key_value": PackedColumn(
            parts=(Part("hidden_size", unit="head_dim"), Part("2*head_dim", unit="2*head_dim", shared=True))
        ),
        "h.*.self_attention.dense": Row(),
        "h.*.mlp.dense_h_to_4h": Column(),
        "h.*.mlp.dense_4h_to_h": Row(),
    },
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "phi": {
        "layers.*": ParallelResidual("self_attn.dense", "mlp.fc2"),
        "layers.*.self_attn.q_layernorm": ReplicatedSumGradient(),
        "layers.*.self_attn.k_layernorm": ReplicatedSumGradient(),
    },
    "fuyu": {
        **{f"language_model.{name}": style for name, style in _PERSIMMON.items()},
        "vision_embed_tokens": Replicated("image patches, joined with full activations"),
    },
    "gpt2": _GPT2,
    "gpt-sw3": _GPT2,
    "gpt_bigcode": {
        **_GPT2,
        # All query heads, then one key and one value that every rank holds.
        "h.*.attn": Divide("num_heads", "embed_dim"),
        "h.*.attn.c_attn": PackedColumn(
            parts=(
                Part("embed_dim", unit="head_dim"),
                Part("kv_dim", unit="head_dim", shared=True),
                Part("kv_dim", unit="head_dim", shared=True),
            )
        ),
    },
    "gpt_neo": {
        "wpe": POSITIONS,
        "h.*.attn.attention": Divide("num_heads", "embed_dim"),
        "h.*.attn.attention.q_proj": Column(unit="head_dim"),
        "h.*.attn.attention.k_proj": Column(unit="head_dim"),
        "h.*.attn.attention.v_proj": Column(unit="head_dim"),
        "h.*.attn.attention.out_proj": Row(),
        "h.*.mlp.c_fc": Column(),
        "h.*.mlp.c_proj": Row(),
    },
    "gpt_neox_japanese": {
        **_NEOX,
        "layers.*.attention.dense_bias": Replicated("added after the sum"),
    },
    "gptj": {
        "h.*.attn": Divide("num_attention_heads", "embed_dim"),
        "h.*.attn.q_proj": Column(unit="head_dim"),
        "h.*.attn.k_proj": Column(unit="head_dim"),
        "h.*.attn.v_proj": Column(unit="head_dim"),
        "h.*.attn.out_proj": Row(),
        "h.*.mlp.fc_in": Column(),
        "h.*.mlp.fc_out": Row(),
        "h.*": ParallelResidual("attn.out_proj", "mlp.fc_out"),
    },
    "mpt": {
        "blocks.*.attn": (Divide("n_heads"), SplitInput("position_bias", 0)),
        "blocks.*.attn.Wqkv": PackedColumn(count=3, unit="head_dim"),
        "blocks.*.attn.out_proj": Row(),
        "blocks.*.ffn.up_proj": Column(),
        "blocks.*.ffn.down_proj": Row(),
    },
    "openai-gpt": {
        "positions_embed": POSITIONS,
        "h.*.attn": Divide("n_head", "split_size"),
        "h.*.attn.c_attn": PackedColumn(count=3, unit="split_size//n_head"),
        "h.*.attn.c_proj": Row(),
        "h.*.mlp.c_fc": Column(),
        "h.*.mlp.c_proj": Row(),
    },
    "opt": {
        "decoder.embed_positions": POSITIONS,
        "decoder.project_in": Replicated("between embedding and blocks"),
        "decoder.project_out": Replicated("between blocks and head"),
        "decoder.layers.*.self_attn": Divide("num_heads", "embed_dim"),
        "decoder.layers.*.self_attn.q_proj": Column(unit="head_dim"),
        "decoder.layers.*.self_attn.k_proj": Column(unit="head_dim"),
        "decoder.layers.*.self_attn.v_proj": Column(unit="head_dim"),
        "decoder.layers.*.self_attn.out_proj": Row(),
        "decoder.layers.*.fc1": Column(),
        "decoder.layers.*.fc2": Row(),
    },
    "persimmon": _PERSIMMON,
    "stablelm": {
        **_SEPARATE_QKV,
        "layers.*.self_attn": Divide("num_heads", "num_key_value_heads", "hidden_size"),
        "layers.*.self_attn.q_layernorm": PerHeadNorms(),
        "layers.*.self_attn.k_layernorm": PerHeadNorms(),
        "layers.*.self_attn.q_layernorm.norms.*": ReplicatedSumGradient(),
        "layers.*.self_attn.k_layernorm.norms.*": ReplicatedSumGradient(),
    },
}

VARIANTS = [
    Variant("falcon", {"parallel_attn": True}, {"h.*": _FALCON_PAIR}),
    Variant(
        "falcon",
        {"multi_query": False},
        {
            "h.*.self_attention": (Divide("num_heads", "num_kv_heads", "hidden_size", "split_size"), *_ALIBI),
            "h.*.self_attention.query_key_value": Column(unit="3*head_dim"),
        },
    ),
    Variant(
        "falcon",
        {"new_decoder_architecture": True},
        {
            # A group holds its query heads, its key and its value.
            "h.*.self_attention": (Divide("num_heads", "num_kv_heads", "hidden_size", "split_size"), *_ALIBI),
            "h.*": _FALCON_PAIR,
            "h.*.ln_attn": (EnterThrough(), ReplicatedSumGradient()),
            "h.*.ln_mlp": (EnterThrough(), ReplicatedSumGradient()),
            "h.*.self_attention.query_key_value": (
                Column(unit="num_heads//num_kv_heads*head_dim+2*head_dim"),
                InsideRegion(),
            ),
            "h.*.mlp.dense_h_to_4h": (Column(), InsideRegion()),
        },
    ),
    Variant(
        "falcon",
        {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
        {
            # One norm for both branches: its output enters.
            "h.*.self_attention.query_key_value": Column(unit="num_heads//num_kv_heads*head_dim+2*head_dim"),
            "h.*.mlp.dense_h_to_4h": Column(),
        },
    ),
    Variant("gpt_neox", {"use_parallel_residual": True}, _NEOX_PAIR),
    Variant(
        "stablelm", {"use_parallel_residual": True}, {"layers.*": ParallelResidual("self_attn.o_proj", "mlp.down_proj")}
    ),
    Variant(
        "gpt_bigcode",
        {"multi_query": False},
        {
            "h.*.attn": Divide("num_heads", "embed_dim", "kv_heads", "kv_dim"),
            "h.*.attn.c_attn": Column(unit="3*head_dim"),
        },
    ),
]
