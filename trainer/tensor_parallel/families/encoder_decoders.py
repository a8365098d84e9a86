"""Encoder-decoders, and decoders that consist of their blocks."""

from __future__ import annotations

from trainer.tensor_parallel.families.common import BEFORE, POSITIONS, Entries
from trainer.tensor_parallel.styles import (
    Column,
    Divide,
    GatherInput,
    KeyValueColumn,
    NarrowInput,
    PackedColumn,
    Replicated,
    Requires,
    Row,
    VocabularyEmbedding,
    VocabularyHead,
    VocabularyParameter,
)

SIZED_BY_INPUT = (NarrowInput(), Divide("num_heads", "embed_dim"))
"""Entries for an attention whose result has the shape of its input."""

BART: Entries = {
    "shared": VocabularyEmbedding(),
    "encoder.embed_tokens": VocabularyEmbedding(),
    "encoder.embed_positions": POSITIONS,
    "encoder.layers.*.self_attn": Divide("num_heads", "embed_dim"),
    "encoder.layers.*.self_attn.q_proj": Column(unit="head_dim"),
    "encoder.layers.*.self_attn.k_proj": Column(unit="head_dim"),
    "encoder.layers.*.self_attn.v_proj": Column(unit="head_dim"),
    "encoder.layers.*.self_attn.out_proj": Row(),
    "encoder.layers.*.fc1": Column(),
    "encoder.layers.*.fc2": Row(),
    "decoder.embed_tokens": VocabularyEmbedding(),
    "decoder.embed_positions": POSITIONS,
    "decoder.layers.*.self_attn": Divide("num_heads", "embed_dim"),
    "decoder.layers.*.self_attn.q_proj": Column(unit="head_dim"),
    "decoder.layers.*.self_attn.k_proj": Column(unit="head_dim"),
    "decoder.layers.*.self_attn.v_proj": Column(unit="head_dim"),
    "decoder.layers.*.self_attn.out_proj": Row(),
    "decoder.layers.*.encoder_attn": Divide("num_heads", "embed_dim"),
    "decoder.layers.*.encoder_attn.q_proj": Column(unit="head_dim"),
    "decoder.layers.*.encoder_attn.k_proj": Column(unit="head_dim"),
    "decoder.layers.*.encoder_attn.v_proj": Column(unit="head_dim"),
    "decoder.layers.*.encoder_attn.out_proj": Row(),
    "decoder.layers.*.fc1": Column(),
    "decoder.layers.*.fc2": Row(),
    "final_logits_bias": VocabularyParameter(1),
}

GPT_LIKE_BART: Entries = {
    "embed_positions": POSITIONS,
    "layers.*.self_attn": Divide("num_heads", "embed_dim"),
    "layers.*.self_attn.q_proj": Column(unit="head_dim"),
    "layers.*.self_attn.k_proj": Column(unit="head_dim"),
    "layers.*.self_attn.v_proj": Column(unit="head_dim"),
    "layers.*.self_attn.out_proj": Row(),
    "layers.*.encoder_attn": Divide("num_heads", "embed_dim"),
    "layers.*.encoder_attn.q_proj": Column(unit="head_dim"),
    "layers.*.encoder_attn.k_proj": Column(unit="head_dim"),
    "layers.*.encoder_attn.v_proj": Column(unit="head_dim"),
    "layers.*.encoder_attn.out_proj": Row(),
    "layers.*.fc1": Column(),
    "layers.*.fc2": Row(),
}
"""Decoders of BART's blocks without BART's names around them."""

SIZED_ENCODER: Entries = {
    "encoder.layers.*.self_attn": SIZED_BY_INPUT,
    "encoder.layers.*.self_attn.q_proj": (GatherInput(), Column(unit="head_dim")),
    "encoder.layers.*.self_attn.k_proj": (GatherInput(), Column(unit="head_dim")),
    "encoder.layers.*.self_attn.v_proj": (GatherInput(), Column(unit="head_dim")),
}

SIZED_DECODER: Entries = {
    "decoder.layers.*.self_attn": SIZED_BY_INPUT,
    "decoder.layers.*.self_attn.q_proj": (GatherInput(), Column(unit="head_dim")),
    "decoder.layers.*.self_attn.k_proj": (GatherInput(), Column(unit="head_dim")),
    "decoder.layers.*.self_attn.v_proj": (GatherInput(), Column(unit="head_dim")),
    "decoder.layers.*.encoder_attn": SIZED_BY_INPUT,
    "decoder.layers.*.encoder_attn.q_proj": (GatherInput(), Column(unit="head_dim")),
}

T5_ATTENTION = Divide("n_heads", "inner_dim")

T5: Entries = {
    "shared": VocabularyEmbedding(),
    "encoder.embed_tokens": VocabularyEmbedding(),
    "encoder.block.*.layer.*.layer_norm": BEFORE,
    "encoder.block.*.layer.*.SelfAttention": T5_ATTENTION,
    "encoder.block.*.layer.*.SelfAttention.q": Column(unit="key_value_proj_dim"),
    "encoder.block.*.layer.*.SelfAttention.k": Column(unit="key_value_proj_dim"),
    "encoder.block.*.layer.*.SelfAttention.v": Column(unit="key_value_proj_dim"),
    "encoder.block.*.layer.*.SelfAttention.o": Row(),
    # One number for each head and distance, in all layers: the heads stay sharded.
    "encoder.block.*.layer.*.SelfAttention.relative_attention_bias": Column(),
    "encoder.block.*.layer.*.DenseReluDense.wi": Column(),
    "encoder.block.*.layer.*.DenseReluDense.wi_0": Column(),
    "encoder.block.*.layer.*.DenseReluDense.wi_1": Column(),
    "encoder.block.*.layer.*.DenseReluDense.wo": Row(),
    "decoder.embed_tokens": VocabularyEmbedding(),
    "decoder.block.*.layer.*.layer_norm": BEFORE,
    "decoder.block.*.layer.*.SelfAttention": T5_ATTENTION,
    "decoder.block.*.layer.*.SelfAttention.q": Column(unit="key_value_proj_dim"),
    "decoder.block.*.layer.*.SelfAttention.k": Column(unit="key_value_proj_dim"),
    "decoder.block.*.layer.*.SelfAttention.v": Column(unit="key_value_proj_dim"),
    "decoder.block.*.layer.*.SelfAttention.o": Row(),
    "decoder.block.*.layer.*.SelfAttention.relative_attention_bias": Column(),
    "decoder.block.*.layer.*.EncDecAttention": T5_ATTENTION,
    "decoder.block.*.layer.*.EncDecAttention.q": Column(unit="key_value_proj_dim"),
    "decoder.block.*.layer.*.EncDecAttention.k": Column(unit="key_value_proj_dim"),
    "decoder.block.*.layer.*.EncDecAttention.v": Column(unit="key_value_proj_dim"),
    "decoder.block.*.layer.*.EncDecAttention.o": Row(),
    "decoder.block.*.layer.*.DenseReluDense.wi": Column(),
    "decoder.block.*.layer.*.DenseReluDense.wi_0": Column(),
    "decoder.block.*.layer.*.DenseReluDense.wi_1": Column(),
    "decoder.block.*.layer.*.DenseReluDense.wo": Row(),
}


PLANS: dict[str, Entries] = {
    "bart": BART,
    "bigbird_pegasus": BART
    | {
        "encoder": Requires("attention_type", "original_full"),
        "encoder.layers.*.self_attn": None,
        "encoder.layers.*.self_attn.self": Divide("num_attention_heads", "all_head_size"),
        "encoder.layers.*.self_attn.self.query": Column(unit="attention_head_size"),
        "encoder.layers.*.self_attn.self.key": Column(unit="attention_head_size"),
        "encoder.layers.*.self_attn.self.value": Column(unit="attention_head_size"),
        "encoder.layers.*.self_attn.output": Row(),
    },
    "biogpt": GPT_LIKE_BART,
    "blenderbot": BART,
    "blenderbot-small": BART,
    "fsmt": BART | SIZED_ENCODER | SIZED_DECODER | {"decoder.output_projection": VocabularyHead()},
    "longt5": T5
    | {
        "encoder.block.*.layer.*.LocalSelfAttention": T5_ATTENTION,
        "encoder.block.*.layer.*.LocalSelfAttention.q": Column(unit="key_value_proj_dim"),
        "encoder.block.*.layer.*.LocalSelfAttention.k": Column(unit="key_value_proj_dim"),
        "encoder.block.*.layer.*.LocalSelfAttention.v": Column(unit="key_value_proj_dim"),
        "encoder.block.*.layer.*.LocalSelfAttention.o": Row(),
        "encoder.block.*.layer.*.LocalSelfAttention.relative_attention_bias": Column(),
    },
    "m2m_100": BART,
    "marian": BART,
    "mbart": BART,
    "moshi": {
        "layers.*.self_attn.q_proj.linear": Column(unit="head_dim"),
        "layers.*.self_attn.k_proj.linear": KeyValueColumn(unit="head_dim"),
        "layers.*.self_attn.v_proj.linear": KeyValueColumn(unit="head_dim"),
        "layers.*.self_attn.o_proj.linear": Row(),
        "layers.*.mlp.fc1": PackedColumn(),
        "layers.*.mlp.fc2": Row(),
    },
    "mt5": T5,
    "mvp": BART,
    "pegasus": BART,
    "pegasus_x": BART | SIZED_ENCODER | {"encoder.embed_global": Replicated("vectors of global tokens")},
    "plbart": BART,
    "seamless_m4t": {
        "shared": VocabularyEmbedding(),
        "text_encoder.embed_tokens": VocabularyEmbedding(),
        "text_encoder.layers.*.self_attn": Divide("num_heads"),
        "text_encoder.layers.*.self_attn.q_proj": Column(unit="head_dim"),
        "text_encoder.layers.*.self_attn.k_proj": Column(unit="head_dim"),
        "text_encoder.layers.*.self_attn.v_proj": Column(unit="head_dim"),
        "text_encoder.layers.*.self_attn.out_proj": Row(),
        "text_encoder.layers.*.ffn.fc1": Column(),
        "text_encoder.layers.*.ffn.fc2": Row(),
        "text_decoder.embed_tokens": VocabularyEmbedding(),
        "text_decoder.layers.*.self_attn": Divide("num_heads"),
        "text_decoder.layers.*.self_attn.q_proj": Column(unit="head_dim"),
        "text_decoder.layers.*.self_attn.k_proj": Column(unit="head_dim"),
        "text_decoder.layers.*.self_attn.v_proj": Column(unit="head_dim"),
        "text_decoder.layers.*.self_attn.out_proj": Row(),
        "text_decoder.layers.*.cross_attention": Divide("num_heads"),
        "text_decoder.layers.*.cross_attention.q_proj": Column(unit="head_dim"),
        "text_decoder.layers.*.cross_attention.k_proj": Column(unit="head_dim"),
        "text_decoder.layers.*.cross_attention.v_proj": Column(unit="head_dim"),
        "text_decoder.layers.*.cross_attention.out_proj": Row(),
        "text_decoder.layers.*.ffn.fc1": Column(),
        "text_decoder.layers.*.ffn.fc2": Row(),
    },
    "t5": T5,
    "t5gemma": {
        "decoder.layers.*.cross_attn.q_proj": Column(unit="head_dim"),
        "decoder.layers.*.cross_attn.k_proj": KeyValueColumn(unit="head_dim"),
        "decoder.layers.*.cross_attn.v_proj": KeyValueColumn(unit="head_dim"),
        "decoder.layers.*.cross_attn.o_proj": Row(),
    },
    "trocr": BART | SIZED_DECODER,
    "umt5": T5,
    "whisper": BART,
    "xglm": GPT_LIKE_BART,
}
