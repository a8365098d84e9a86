"""Encoders, and decoders that consist of their blocks."""

from __future__ import annotations

from trainer.tensor_parallel.families.common import AFTER, BEFORE, POSITIONS, TYPES, Entries
from trainer.tensor_parallel.styles import (
    Column,
    Divide,
    PackedColumn,
    PackedRow,
    Replicated,
    Requires,
    ResidualInside,
    Row,
    ShardedParameter,
    SplitOutput,
    VocabularyHead,
)

TRANSFORM = Replicated("one layer before the head, on full activations")

CONTACT = Replicated("predicts contacts from attention maps, which training does not use")

PREDICTIONS: Entries = {
    "cls.predictions.transform.dense": TRANSFORM,
    "cls.predictions.bias": VocabularyHead(),
    "lm_head.dense": TRANSFORM,
    "lm_head.bias": VocabularyHead(),
}
"""The heads of BERT and of RoBERTa; their bias has a second name in the head's own module."""

BERT: Entries = PREDICTIONS | {
    "embeddings.position_embeddings": POSITIONS,
    "embeddings.token_type_embeddings": TYPES,
    "encoder.layer.*.attention.self": Divide("num_attention_heads", "all_head_size"),
    "encoder.layer.*.attention.self.query": Column(unit="attention_head_size"),
    "encoder.layer.*.attention.self.key": Column(unit="attention_head_size"),
    "encoder.layer.*.attention.self.value": Column(unit="attention_head_size"),
    "encoder.layer.*.attention.output.dense": Row(),
    "encoder.layer.*.attention.output.LayerNorm": AFTER,
    "encoder.layer.*.crossattention.self": Divide("num_attention_heads", "all_head_size"),
    "encoder.layer.*.crossattention.self.query": Column(unit="attention_head_size"),
    "encoder.layer.*.crossattention.self.key": Column(unit="attention_head_size"),
    "encoder.layer.*.crossattention.self.value": Column(unit="attention_head_size"),
    "encoder.layer.*.crossattention.output.dense": Row(),
    "encoder.layer.*.crossattention.output.LayerNorm": AFTER,
    "encoder.layer.*.intermediate.dense": Column(),
    "encoder.layer.*.output.dense": Row(),
    "encoder.layer.*.output.LayerNorm": AFTER,
}

ANGLES = Replicated("a table of angles; it has no gradient")

PROJECTION = Replicated("widths of the embedding and of the blocks, on full activations")

XLM: Entries = {
    "position_embeddings": POSITIONS,
    "lang_embeddings": TYPES,
    "attentions.*": Divide("n_heads"),
    "attentions.*.q_lin": Column(unit="head_dim"),
    "attentions.*.k_lin": Column(unit="head_dim"),
    "attentions.*.v_lin": Column(unit="head_dim"),
    "attentions.*.out_lin": Row(),
    "ffns.*.lin1": Column(),
    "ffns.*.lin2": Row(),
}

NEW_BERT: Entries = PREDICTIONS | {
    "embeddings.token_type_embeddings": TYPES,
    "layers.*.self_attn.q_proj": Column(unit="head_dim"),
    "layers.*.self_attn.k_proj": Column(unit="head_dim"),
    "layers.*.self_attn.v_proj": Column(unit="head_dim"),
    "layers.*.self_attn.o_proj": Row(),
    "layers.*.mlp.gate_proj": Column(),
    "layers.*.mlp.up_proj": Column(),
    "layers.*.mlp.down_proj": Row(),
    "layers.*.mlp.fc1": Column(),
    "layers.*.mlp.fc2": Row(),
}
"""Encoders of BERT's kind in the layout of Llama."""

DEBERTA: Entries = BERT | {
    "encoder.rel_embeddings": Replicated("positions, which enter each block with its projections of them"),
    "encoder.conv.conv": Replicated("one convolution, parallel to the first block"),
    # The other head multiplies with the embedding's weight itself, and the model does not register it as its head.
    "lm_predictions": Requires("legacy", "True"),
    "lm_predictions.lm_head.dense": TRANSFORM,
}


PLANS: dict[str, Entries] = {
    "albert": {
        "embeddings.position_embeddings": POSITIONS,
        "embeddings.token_type_embeddings": TYPES,
        "encoder.embedding_hidden_mapping_in": PROJECTION,
        "encoder.albert_layer_groups.*.albert_layers.*.attention": Divide("num_attention_heads", "all_head_size"),
        "encoder.albert_layer_groups.*.albert_layers.*.attention.query": Column(unit="attention_head_size"),
        "encoder.albert_layer_groups.*.albert_layers.*.attention.key": Column(unit="attention_head_size"),
        "encoder.albert_layer_groups.*.albert_layers.*.attention.value": Column(unit="attention_head_size"),
        "encoder.albert_layer_groups.*.albert_layers.*.attention.dense": Row(),
        "encoder.albert_layer_groups.*.albert_layers.*.attention.LayerNorm": AFTER,
        "encoder.albert_layer_groups.*.albert_layers.*.ffn": Column(),
        "encoder.albert_layer_groups.*.albert_layers.*.ffn_output": Row(),
        "encoder.albert_layer_groups.*.albert_layers.*.full_layer_layer_norm": AFTER,
        "pooler": TRANSFORM,
        "predictions.dense": TRANSFORM,
        "predictions.bias": VocabularyHead(),
    },
    "bert": BERT,
    "bert-generation": BERT,
    "big_bird": BERT
    | {
        # Block-sparse attention draws the random blocks of all heads from one generator, head after head.
        "encoder": Requires("attention_type", "original_full"),
        "pooler": TRANSFORM,
    },
    "camembert": BERT,
    "convbert": BERT
    | {
        "embeddings_project": PROJECTION,
        # The filter of each head comes from the heads of all ranks.
        "encoder.layer.*.attention.self.key_conv_attn_layer.depthwise": BEFORE,
        "encoder.layer.*.attention.self.key_conv_attn_layer.pointwise": Column(unit="attention_head_size"),
        "encoder.layer.*.attention.self.key_conv_attn_layer.bias": ShardedParameter(dim=0),
        "encoder.layer.*.attention.self.conv_kernel_layer": (Row(), SplitOutput()),
        "encoder.layer.*.attention.self.conv_out_layer": Column(unit="attention_head_size"),
        "encoder.layer.*.attention.output.dense": PackedRow(),
        "generator_predictions.dense": TRANSFORM,
    },
    "cpmant": {
        "segment_embedding": TYPES,
        "position_bias.relative_attention_bias": ShardedParameter(dim=1),
        "encoder.layers.*.self_att.layernorm_before_attention": BEFORE,
        "encoder.layers.*.self_att.self_attention": Divide("num_heads"),
        "encoder.layers.*.self_att.self_attention.project_q": Column(unit="dim_head"),
        "encoder.layers.*.self_att.self_attention.project_k": Column(unit="dim_head"),
        "encoder.layers.*.self_att.self_attention.project_v": Column(unit="dim_head"),
        "encoder.layers.*.self_att.self_attention.attention_out": Row(),
        "encoder.layers.*.ffn.layernorm_before_ffn": BEFORE,
        "encoder.layers.*.ffn.ffn.w_in.w_0": Column(),
        "encoder.layers.*.ffn.ffn.w_in.w_1": Column(),
        "encoder.layers.*.ffn.ffn.w_out": Row(),
    },
    "ctrl": {
        "h.*.multi_head_attention.Wq": Column(unit="head_dim"),
        "h.*.multi_head_attention.Wk": Column(unit="head_dim"),
        "h.*.multi_head_attention.Wv": Column(unit="head_dim"),
        "h.*.multi_head_attention.dense": Row(),
        "h.*.ffn.0": Column(),
        "h.*.ffn.2": Row(),
    },
    "data2vec-text": BERT,
    "deberta": DEBERTA
    | {
        "encoder.layer.*.attention.self.in_proj": Column(unit="3*attention_head_size"),
        "encoder.layer.*.attention.self.q_bias": Column(unit="attention_head_size"),
        "encoder.layer.*.attention.self.v_bias": Column(unit="attention_head_size"),
        "encoder.layer.*.attention.self.pos_proj": Column(unit="attention_head_size"),
        "encoder.layer.*.attention.self.pos_q_proj": Column(unit="attention_head_size"),
    },
    "deberta-v2": DEBERTA
    | {
        "encoder.layer.*.attention.self.query_proj": Column(unit="attention_head_size"),
        "encoder.layer.*.attention.self.key_proj": Column(unit="attention_head_size"),
        "encoder.layer.*.attention.self.value_proj": Column(unit="attention_head_size"),
        "encoder.layer.*.attention.self.pos_key_proj": Column(unit="attention_head_size"),
        "encoder.layer.*.attention.self.pos_query_proj": Column(unit="attention_head_size"),
    },
    "distilbert": {
        "embeddings.position_embeddings": POSITIONS,
        "transformer.layer.*.attention.q_lin": Column(unit="attention_head_size"),
        "transformer.layer.*.attention.k_lin": Column(unit="attention_head_size"),
        "transformer.layer.*.attention.v_lin": Column(unit="attention_head_size"),
        "transformer.layer.*.attention.out_lin": Row(),
        "transformer.layer.*.ffn.lin1": Column(),
        "transformer.layer.*.ffn.lin2": Row(),
        "vocab_transform": TRANSFORM,
    },
    "electra": BERT | {"embeddings_project": PROJECTION, "generator_predictions.dense": TRANSFORM},
    "ernie": BERT | {"embeddings.task_type_embeddings": TYPES},
    "esm": BERT | {"encoder.layer.*.attention.LayerNorm": BEFORE, "contact_head.regression": CONTACT},
    "flaubert": XLM,
    "fnet": BERT | {"embeddings.projection": PROJECTION, "pooler.dense": TRANSFORM},
    "git": BERT
    | {
        "image_encoder.vision_model.embeddings.patch_embedding": Replicated("patches, on full activations"),
        "image_encoder.vision_model.embeddings.position_embedding": POSITIONS,
        "image_encoder.vision_model.encoder.layers.*.self_attn.q_proj": Column(unit="head_dim"),
        "image_encoder.vision_model.encoder.layers.*.self_attn.k_proj": Column(unit="head_dim"),
        "image_encoder.vision_model.encoder.layers.*.self_attn.v_proj": Column(unit="head_dim"),
        "image_encoder.vision_model.encoder.layers.*.self_attn.out_proj": Row(),
        "image_encoder.vision_model.encoder.layers.*.mlp.fc1": Column(),
        "image_encoder.vision_model.encoder.layers.*.mlp.fc2": Row(),
        "visual_projection.visual_projection.0": PROJECTION,
        "img_temporal_embedding.*": POSITIONS,
    },
    "gte": NEW_BERT,
    "jina_embeddings_v3": NEW_BERT,
    "layoutlm": BERT
    | {
        "embeddings.x_position_embeddings": POSITIONS,
        "embeddings.y_position_embeddings": POSITIONS,
        "embeddings.h_position_embeddings": POSITIONS,
        "embeddings.w_position_embeddings": POSITIONS,
        "pooler.dense": TRANSFORM,
    },
    "megatron-bert": BERT | {"encoder.layer.*.attention.ln": BEFORE, "encoder.layer.*.crossattention.ln": BEFORE},
    "modernbert": {
        "layers.*.attn.Wqkv": PackedColumn(count=3, unit="head_dim"),
        "layers.*.attn.Wo": Row(),
        "layers.*.mlp.Wi": PackedColumn(),
        "layers.*.mlp.Wo": Row(),
        "head.dense": TRANSFORM,
    },
    "modernbert-decoder": {
        "layers.*.attn.q_proj": Column(unit="head_dim"),
        "layers.*.attn.k_proj": Column(unit="head_dim"),
        "layers.*.attn.v_proj": Column(unit="head_dim"),
        "layers.*.attn.Wo": Row(),
        "layers.*.mlp.Wi": PackedColumn(),
        "layers.*.mlp.Wo": Row(),
        "lm_head.dense": TRANSFORM,
    },
    "mpnet": BERT
    | {
        "encoder.relative_attention_bias": Column(),
        "encoder.layer.*.attention.attn": Divide("num_attention_heads", "all_head_size"),
        "encoder.layer.*.attention.attn.q": Column(unit="attention_head_size"),
        "encoder.layer.*.attention.attn.k": Column(unit="attention_head_size"),
        "encoder.layer.*.attention.attn.v": Column(unit="attention_head_size"),
        "encoder.layer.*.attention.attn.o": Row(),
        "encoder.layer.*.attention.LayerNorm": AFTER,
    },
    "nomic_bert": NEW_BERT,
    "rembert": BERT | {"encoder.embedding_hidden_mapping_in": PROJECTION, "cls.predictions.dense": TRANSFORM},
    "roberta": BERT,
    "roberta-prelayernorm": BERT
    | {
        "encoder.layer.*.attention.LayerNorm": BEFORE,
        "encoder.layer.*.crossattention.LayerNorm": BEFORE,
        "encoder.layer.*.intermediate.LayerNorm": BEFORE,
    },
    "roc_bert": BERT
    | {
        "embeddings.pronunciation_embed": TYPES,
        "embeddings.shape_embed": TYPES,
        "embeddings.map_inputs_layer": PROJECTION,
    },
    "roformer": BERT | {"encoder.embed_positions": ANGLES, "embeddings_project": PROJECTION},
    "tapas": BERT
    | {
        "embeddings.token_type_embeddings_0": TYPES,
        "embeddings.token_type_embeddings_1": TYPES,
        "embeddings.token_type_embeddings_2": TYPES,
        "embeddings.token_type_embeddings_3": TYPES,
        "embeddings.token_type_embeddings_4": TYPES,
        "embeddings.token_type_embeddings_5": TYPES,
        "embeddings.token_type_embeddings_6": TYPES,
    },
    "ultrabert": {"head.linear1": TRANSFORM, "head.linear2": TRANSFORM},
    "xlm": XLM,
    "xlm-roberta": BERT,
    "xlm-roberta-xl": BERT
    | {
        "encoder.layer.*.attention.self_attn_layer_norm": BEFORE,
        "encoder.layer.*.crossattention.self_attn_layer_norm": BEFORE,
    },
    "xlnet": {
        "mask_emb": Replicated("one vector, a full activation"),
        "layer.*.rel_attn": ResidualInside("layer_norm"),
        "layer.*.rel_attn.q": ShardedParameter(dim=1),
        "layer.*.rel_attn.k": ShardedParameter(dim=1),
        "layer.*.rel_attn.v": ShardedParameter(dim=1),
        "layer.*.rel_attn.o": ShardedParameter(dim=1),
        "layer.*.rel_attn.r": ShardedParameter(dim=1),
        "layer.*.rel_attn.r_r_bias": ShardedParameter(dim=0),
        "layer.*.rel_attn.r_s_bias": ShardedParameter(dim=0),
        "layer.*.rel_attn.r_w_bias": ShardedParameter(dim=0),
        "layer.*.rel_attn.seg_embed": ShardedParameter(dim=1),
        "layer.*.rel_attn.layer_norm": AFTER,
        "layer.*.ff.layer_1": Column(),
        "layer.*.ff.layer_2": Row(),
        "layer.*.ff.layer_norm": AFTER,
    },
    "yoso": BERT,
    "xmod": BERT
    | {
        "encoder.layer.*.output.adapter_layer_norm": AFTER,
        # One adapter for each language; further languages need entries like these.
        "encoder.layer.*.output.adapter_modules.en_XX.dense1": Column(),
        "encoder.layer.*.output.adapter_modules.en_XX.dense2": Row(),
    },
}
