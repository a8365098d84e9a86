"""Encoders, encoder-decoders, and the decoders that are made of their blocks."""

from __future__ import annotations

from trainer.tensor_parallel.families.common import POSITIONS, Rows

AFTER = "replicate:after the exit of the block"
BEFORE = "replicate:before the entrance to the block"
TYPES = "replicate:segment vectors, added to whole activations"
TRANSFORM = "replicate:one layer before the head, on whole activations"

CONTACT = "replicate:predicts contacts from attention maps, which training does not ask for"

PREDICTIONS: Rows = {
    "cls.predictions.transform.dense": TRANSFORM,
    "cls.predictions.bias": "vocabulary_head",
    "lm_head.dense": TRANSFORM,
    "lm_head.bias": "vocabulary_head",
}
"""The heads of BERT and of RoBERTa; their bias has a second name in the head's own module."""

BERT: Rows = PREDICTIONS | {
    "embeddings.position_embeddings": POSITIONS,
    "embeddings.token_type_embeddings": TYPES,
    "encoder.layer.*.attention.self": "divide:num_attention_heads,all_head_size",
    "encoder.layer.*.attention.self.query": "colwise:attention_head_size",
    "encoder.layer.*.attention.self.key": "colwise:attention_head_size",
    "encoder.layer.*.attention.self.value": "colwise:attention_head_size",
    "encoder.layer.*.attention.output.dense": "rowwise",
    "encoder.layer.*.attention.output.LayerNorm": AFTER,
    "encoder.layer.*.crossattention.self": "divide:num_attention_heads,all_head_size",
    "encoder.layer.*.crossattention.self.query": "colwise:attention_head_size",
    "encoder.layer.*.crossattention.self.key": "colwise:attention_head_size",
    "encoder.layer.*.crossattention.self.value": "colwise:attention_head_size",
    "encoder.layer.*.crossattention.output.dense": "rowwise",
    "encoder.layer.*.crossattention.output.LayerNorm": AFTER,
    "encoder.layer.*.intermediate.dense": "colwise",
    "encoder.layer.*.output.dense": "rowwise",
    "encoder.layer.*.output.LayerNorm": AFTER,
}

ANGLES = "replicate:a table of angles; it has no gradient"
PROJECTION = "replicate:widths of the embedding and of the blocks, on whole activations"

SIZED_BY_INPUT = "narrow_input + divide:num_heads,embed_dim"
"""For an attention that gives its result the shape of its input."""

BART: Rows = {
    "shared": "embedding_rowwise",
    "encoder.embed_tokens": "embedding_rowwise",
    "encoder.embed_positions": POSITIONS,
    "encoder.layers.*.self_attn": "divide:num_heads,embed_dim",
    "encoder.layers.*.self_attn.q_proj": "colwise:head_dim",
    "encoder.layers.*.self_attn.k_proj": "colwise:head_dim",
    "encoder.layers.*.self_attn.v_proj": "colwise:head_dim",
    "encoder.layers.*.self_attn.out_proj": "rowwise",
    "encoder.layers.*.fc1": "colwise",
    "encoder.layers.*.fc2": "rowwise",
    "decoder.embed_tokens": "embedding_rowwise",
    "decoder.embed_positions": POSITIONS,
    "decoder.layers.*.self_attn": "divide:num_heads,embed_dim",
    "decoder.layers.*.self_attn.q_proj": "colwise:head_dim",
    "decoder.layers.*.self_attn.k_proj": "colwise:head_dim",
    "decoder.layers.*.self_attn.v_proj": "colwise:head_dim",
    "decoder.layers.*.self_attn.out_proj": "rowwise",
    "decoder.layers.*.encoder_attn": "divide:num_heads,embed_dim",
    "decoder.layers.*.encoder_attn.q_proj": "colwise:head_dim",
    "decoder.layers.*.encoder_attn.k_proj": "colwise:head_dim",
    "decoder.layers.*.encoder_attn.v_proj": "colwise:head_dim",
    "decoder.layers.*.encoder_attn.out_proj": "rowwise",
    "decoder.layers.*.fc1": "colwise",
    "decoder.layers.*.fc2": "rowwise",
    "final_logits_bias": "vocabulary:1",
}

GPT_LIKE_BART: Rows = {
    "embed_positions": POSITIONS,
    "layers.*.self_attn": "divide:num_heads,embed_dim",
    "layers.*.self_attn.q_proj": "colwise:head_dim",
    "layers.*.self_attn.k_proj": "colwise:head_dim",
    "layers.*.self_attn.v_proj": "colwise:head_dim",
    "layers.*.self_attn.out_proj": "rowwise",
    "layers.*.encoder_attn": "divide:num_heads,embed_dim",
    "layers.*.encoder_attn.q_proj": "colwise:head_dim",
    "layers.*.encoder_attn.k_proj": "colwise:head_dim",
    "layers.*.encoder_attn.v_proj": "colwise:head_dim",
    "layers.*.encoder_attn.out_proj": "rowwise",
    "layers.*.fc1": "colwise",
    "layers.*.fc2": "rowwise",
}
"""Decoders of BART's blocks without BART's names around them."""

SIZED_ENCODER: Rows = {
    "encoder.layers.*.self_attn": SIZED_BY_INPUT,
    "encoder.layers.*.self_attn.q_proj": "gather_input + colwise:head_dim",
    "encoder.layers.*.self_attn.k_proj": "gather_input + colwise:head_dim",
    "encoder.layers.*.self_attn.v_proj": "gather_input + colwise:head_dim",
}
SIZED_DECODER: Rows = {
    "decoder.layers.*.self_attn": SIZED_BY_INPUT,
    "decoder.layers.*.self_attn.q_proj": "gather_input + colwise:head_dim",
    "decoder.layers.*.self_attn.k_proj": "gather_input + colwise:head_dim",
    "decoder.layers.*.self_attn.v_proj": "gather_input + colwise:head_dim",
    "decoder.layers.*.encoder_attn": SIZED_BY_INPUT,
    "decoder.layers.*.encoder_attn.q_proj": "gather_input + colwise:head_dim",
}

T5_ATTENTION = "divide:n_heads,inner_dim"

T5: Rows = {
    "shared": "embedding_rowwise",
    "encoder.embed_tokens": "embedding_rowwise",
    "encoder.block.*.layer.*.layer_norm": BEFORE,
    "encoder.block.*.layer.*.SelfAttention": T5_ATTENTION,
    "encoder.block.*.layer.*.SelfAttention.q": "colwise:key_value_proj_dim",
    "encoder.block.*.layer.*.SelfAttention.k": "colwise:key_value_proj_dim",
    "encoder.block.*.layer.*.SelfAttention.v": "colwise:key_value_proj_dim",
    "encoder.block.*.layer.*.SelfAttention.o": "rowwise",
    # One number for each head and distance, in all layers: the heads stay cut.
    "encoder.block.*.layer.*.SelfAttention.relative_attention_bias": "colwise",
    "encoder.block.*.layer.*.DenseReluDense.wi": "colwise",
    "encoder.block.*.layer.*.DenseReluDense.wi_0": "colwise",
    "encoder.block.*.layer.*.DenseReluDense.wi_1": "colwise",
    "encoder.block.*.layer.*.DenseReluDense.wo": "rowwise",
    "decoder.embed_tokens": "embedding_rowwise",
    "decoder.block.*.layer.*.layer_norm": BEFORE,
    "decoder.block.*.layer.*.SelfAttention": T5_ATTENTION,
    "decoder.block.*.layer.*.SelfAttention.q": "colwise:key_value_proj_dim",
    "decoder.block.*.layer.*.SelfAttention.k": "colwise:key_value_proj_dim",
    "decoder.block.*.layer.*.SelfAttention.v": "colwise:key_value_proj_dim",
    "decoder.block.*.layer.*.SelfAttention.o": "rowwise",
    "decoder.block.*.layer.*.SelfAttention.relative_attention_bias": "colwise",
    "decoder.block.*.layer.*.EncDecAttention": T5_ATTENTION,
    "decoder.block.*.layer.*.EncDecAttention.q": "colwise:key_value_proj_dim",
    "decoder.block.*.layer.*.EncDecAttention.k": "colwise:key_value_proj_dim",
    "decoder.block.*.layer.*.EncDecAttention.v": "colwise:key_value_proj_dim",
    "decoder.block.*.layer.*.EncDecAttention.o": "rowwise",
    "decoder.block.*.layer.*.DenseReluDense.wi": "colwise",
    "decoder.block.*.layer.*.DenseReluDense.wi_0": "colwise",
    "decoder.block.*.layer.*.DenseReluDense.wi_1": "colwise",
    "decoder.block.*.layer.*.DenseReluDense.wo": "rowwise",
}

XLM: Rows = {
    "position_embeddings": POSITIONS,
    "lang_embeddings": TYPES,
    "attentions.*": "divide:n_heads",
    "attentions.*.q_lin": "colwise:head_dim",
    "attentions.*.k_lin": "colwise:head_dim",
    "attentions.*.v_lin": "colwise:head_dim",
    "attentions.*.out_lin": "rowwise",
    "ffns.*.lin1": "colwise",
    "ffns.*.lin2": "rowwise",
}

NEW_BERT: Rows = PREDICTIONS | {
    "embeddings.token_type_embeddings": TYPES,
    "layers.*.self_attn.q_proj": "colwise:head_dim",
    "layers.*.self_attn.k_proj": "colwise:head_dim",
    "layers.*.self_attn.v_proj": "colwise:head_dim",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
    "layers.*.mlp.fc1": "colwise",
    "layers.*.mlp.fc2": "rowwise",
}
"""Encoders of BERT's kind in the layout of Llama."""

DEBERTA: Rows = BERT | {
    "encoder.rel_embeddings": "replicate:positions, which enter each block with its projections of them",
    "encoder.conv.conv": "replicate:one convolution beside the first block",
    # The other head multiplies with the embedding's weight itself, and the model does not call it its head.
    "lm_predictions": "needs:legacy=True",
    "lm_predictions.lm_head.dense": TRANSFORM,
}

PLANS: dict[str, Rows] = {
    "albert": {
        "embeddings.position_embeddings": POSITIONS,
        "embeddings.token_type_embeddings": TYPES,
        "encoder.embedding_hidden_mapping_in": PROJECTION,
        "encoder.albert_layer_groups.*.albert_layers.*.attention": "divide:num_attention_heads,all_head_size",
        "encoder.albert_layer_groups.*.albert_layers.*.attention.query": "colwise:attention_head_size",
        "encoder.albert_layer_groups.*.albert_layers.*.attention.key": "colwise:attention_head_size",
        "encoder.albert_layer_groups.*.albert_layers.*.attention.value": "colwise:attention_head_size",
        "encoder.albert_layer_groups.*.albert_layers.*.attention.dense": "rowwise",
        "encoder.albert_layer_groups.*.albert_layers.*.attention.LayerNorm": AFTER,
        "encoder.albert_layer_groups.*.albert_layers.*.ffn": "colwise",
        "encoder.albert_layer_groups.*.albert_layers.*.ffn_output": "rowwise",
        "encoder.albert_layer_groups.*.albert_layers.*.full_layer_layer_norm": AFTER,
        "pooler": TRANSFORM,
        "predictions.dense": TRANSFORM,
        "predictions.bias": "vocabulary_head",
    },
    "bart": BART,
    "bert": BERT,
    "bert-generation": BERT,
    "big_bird": BERT
    | {
        # Block-sparse attention draws the blocks of each head from one generator, the heads of all ranks in turn.
        "encoder": "needs:attention_type=original_full",
        "pooler": TRANSFORM,
    },
    "bigbird_pegasus": BART
    | {
        "encoder": "needs:attention_type=original_full",
        "encoder.layers.*.self_attn": None,
        "encoder.layers.*.self_attn.self": "divide:num_attention_heads,all_head_size",
        "encoder.layers.*.self_attn.self.query": "colwise:attention_head_size",
        "encoder.layers.*.self_attn.self.key": "colwise:attention_head_size",
        "encoder.layers.*.self_attn.self.value": "colwise:attention_head_size",
        "encoder.layers.*.self_attn.output": "rowwise",
    },
    "biogpt": GPT_LIKE_BART,
    "blenderbot": BART,
    "blenderbot-small": BART,
    "camembert": BERT,
    "convbert": BERT
    | {
        "embeddings_project": PROJECTION,
        # The filter of each head comes from the heads of all ranks.
        "encoder.layer.*.attention.self.key_conv_attn_layer.depthwise": BEFORE,
        "encoder.layer.*.attention.self.key_conv_attn_layer.pointwise": "colwise:attention_head_size",
        "encoder.layer.*.attention.self.key_conv_attn_layer.bias": "cut:0",
        "encoder.layer.*.attention.self.conv_kernel_layer": "rowwise + split_output",
        "encoder.layer.*.attention.self.conv_out_layer": "colwise:attention_head_size",
        "encoder.layer.*.attention.output.dense": "packed_rowwise:2",
        "generator_predictions.dense": TRANSFORM,
    },
    "cpmant": {
        "segment_embedding": TYPES,
        "position_bias.relative_attention_bias": "cut:1",
        "encoder.layers.*.self_att.layernorm_before_attention": BEFORE,
        "encoder.layers.*.self_att.self_attention": "divide:num_heads",
        "encoder.layers.*.self_att.self_attention.project_q": "colwise:dim_head",
        "encoder.layers.*.self_att.self_attention.project_k": "colwise:dim_head",
        "encoder.layers.*.self_att.self_attention.project_v": "colwise:dim_head",
        "encoder.layers.*.self_att.self_attention.attention_out": "rowwise",
        "encoder.layers.*.ffn.layernorm_before_ffn": BEFORE,
        "encoder.layers.*.ffn.ffn.w_in.w_0": "colwise",
        "encoder.layers.*.ffn.ffn.w_in.w_1": "colwise",
        "encoder.layers.*.ffn.ffn.w_out": "rowwise",
    },
    "ctrl": {
        "h.*.multi_head_attention.Wq": "colwise:head_dim",
        "h.*.multi_head_attention.Wk": "colwise:head_dim",
        "h.*.multi_head_attention.Wv": "colwise:head_dim",
        "h.*.multi_head_attention.dense": "rowwise",
        "h.*.ffn.0": "colwise",
        "h.*.ffn.2": "rowwise",
    },
    "data2vec-text": BERT,
    "deberta": DEBERTA
    | {
        "encoder.layer.*.attention.self.in_proj": "colwise:3*attention_head_size",
        "encoder.layer.*.attention.self.q_bias": "colwise:attention_head_size",
        "encoder.layer.*.attention.self.v_bias": "colwise:attention_head_size",
        "encoder.layer.*.attention.self.pos_proj": "colwise:attention_head_size",
        "encoder.layer.*.attention.self.pos_q_proj": "colwise:attention_head_size",
    },
    "deberta-v2": DEBERTA
    | {
        "encoder.layer.*.attention.self.query_proj": "colwise:attention_head_size",
        "encoder.layer.*.attention.self.key_proj": "colwise:attention_head_size",
        "encoder.layer.*.attention.self.value_proj": "colwise:attention_head_size",
        "encoder.layer.*.attention.self.pos_key_proj": "colwise:attention_head_size",
        "encoder.layer.*.attention.self.pos_query_proj": "colwise:attention_head_size",
    },
    "distilbert": {
        "embeddings.position_embeddings": POSITIONS,
        "transformer.layer.*.attention.q_lin": "colwise:attention_head_size",
        "transformer.layer.*.attention.k_lin": "colwise:attention_head_size",
        "transformer.layer.*.attention.v_lin": "colwise:attention_head_size",
        "transformer.layer.*.attention.out_lin": "rowwise",
        "transformer.layer.*.ffn.lin1": "colwise",
        "transformer.layer.*.ffn.lin2": "rowwise",
        "vocab_transform": TRANSFORM,
    },
    "electra": BERT | {"embeddings_project": PROJECTION, "generator_predictions.dense": TRANSFORM},
    "ernie": BERT | {"embeddings.task_type_embeddings": TYPES},
    "esm": BERT | {"encoder.layer.*.attention.LayerNorm": BEFORE, "contact_head.regression": CONTACT},
    "flaubert": XLM,
    "fnet": BERT | {"embeddings.projection": PROJECTION, "pooler.dense": TRANSFORM},
    "fsmt": BART | SIZED_ENCODER | SIZED_DECODER | {"decoder.output_projection": "vocabulary_head"},
    "git": BERT
    | {
        "image_encoder.vision_model.embeddings.patch_embedding": "replicate:patches, on whole activations",
        "image_encoder.vision_model.embeddings.position_embedding": POSITIONS,
        "image_encoder.vision_model.encoder.layers.*.self_attn.q_proj": "colwise:head_dim",
        "image_encoder.vision_model.encoder.layers.*.self_attn.k_proj": "colwise:head_dim",
        "image_encoder.vision_model.encoder.layers.*.self_attn.v_proj": "colwise:head_dim",
        "image_encoder.vision_model.encoder.layers.*.self_attn.out_proj": "rowwise",
        "image_encoder.vision_model.encoder.layers.*.mlp.fc1": "colwise",
        "image_encoder.vision_model.encoder.layers.*.mlp.fc2": "rowwise",
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
    "longt5": T5
    | {
        "encoder.block.*.layer.*.LocalSelfAttention": T5_ATTENTION,
        "encoder.block.*.layer.*.LocalSelfAttention.q": "colwise:key_value_proj_dim",
        "encoder.block.*.layer.*.LocalSelfAttention.k": "colwise:key_value_proj_dim",
        "encoder.block.*.layer.*.LocalSelfAttention.v": "colwise:key_value_proj_dim",
        "encoder.block.*.layer.*.LocalSelfAttention.o": "rowwise",
        "encoder.block.*.layer.*.LocalSelfAttention.relative_attention_bias": "colwise",
    },
    "m2m_100": BART,
    "marian": BART,
    "mbart": BART,
    "megatron-bert": BERT | {"encoder.layer.*.attention.ln": BEFORE, "encoder.layer.*.crossattention.ln": BEFORE},
    "modernbert": {
        "layers.*.attn.Wqkv": "packed_colwise:3/head_dim",
        "layers.*.attn.Wo": "rowwise",
        "layers.*.mlp.Wi": "packed_colwise:2",
        "layers.*.mlp.Wo": "rowwise",
        "head.dense": TRANSFORM,
    },
    "modernbert-decoder": {
        "layers.*.attn.q_proj": "colwise:head_dim",
        "layers.*.attn.k_proj": "colwise:head_dim",
        "layers.*.attn.v_proj": "colwise:head_dim",
        "layers.*.attn.Wo": "rowwise",
        "layers.*.mlp.Wi": "packed_colwise:2",
        "layers.*.mlp.Wo": "rowwise",
        "lm_head.dense": TRANSFORM,
    },
    "moshi": {
        "layers.*.self_attn.q_proj.linear": "colwise:head_dim",
        "layers.*.self_attn.k_proj.linear": "kv_colwise:head_dim",
        "layers.*.self_attn.v_proj.linear": "kv_colwise:head_dim",
        "layers.*.self_attn.o_proj.linear": "rowwise",
        "layers.*.mlp.fc1": "packed_colwise:2",
        "layers.*.mlp.fc2": "rowwise",
    },
    "mpnet": BERT
    | {
        "encoder.relative_attention_bias": "colwise",
        "encoder.layer.*.attention.attn": "divide:num_attention_heads,all_head_size",
        "encoder.layer.*.attention.attn.q": "colwise:attention_head_size",
        "encoder.layer.*.attention.attn.k": "colwise:attention_head_size",
        "encoder.layer.*.attention.attn.v": "colwise:attention_head_size",
        "encoder.layer.*.attention.attn.o": "rowwise",
        "encoder.layer.*.attention.LayerNorm": AFTER,
    },
    "mt5": T5,
    "mvp": BART,
    "nomic_bert": NEW_BERT,
    "pegasus": BART,
    "pegasus_x": BART | SIZED_ENCODER | {"encoder.embed_global": "replicate:vectors of global tokens"},
    "plbart": BART,
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
    "seamless_m4t": {
        "shared": "embedding_rowwise",
        "text_encoder.embed_tokens": "embedding_rowwise",
        "text_encoder.layers.*.self_attn": "divide:num_heads",
        "text_encoder.layers.*.self_attn.q_proj": "colwise:head_dim",
        "text_encoder.layers.*.self_attn.k_proj": "colwise:head_dim",
        "text_encoder.layers.*.self_attn.v_proj": "colwise:head_dim",
        "text_encoder.layers.*.self_attn.out_proj": "rowwise",
        "text_encoder.layers.*.ffn.fc1": "colwise",
        "text_encoder.layers.*.ffn.fc2": "rowwise",
        "text_decoder.embed_tokens": "embedding_rowwise",
        "text_decoder.layers.*.self_attn": "divide:num_heads",
        "text_decoder.layers.*.self_attn.q_proj": "colwise:head_dim",
        "text_decoder.layers.*.self_attn.k_proj": "colwise:head_dim",
        "text_decoder.layers.*.self_attn.v_proj": "colwise:head_dim",
        "text_decoder.layers.*.self_attn.out_proj": "rowwise",
        "text_decoder.layers.*.cross_attention": "divide:num_heads",
        "text_decoder.layers.*.cross_attention.q_proj": "colwise:head_dim",
        "text_decoder.layers.*.cross_attention.k_proj": "colwise:head_dim",
        "text_decoder.layers.*.cross_attention.v_proj": "colwise:head_dim",
        "text_decoder.layers.*.cross_attention.out_proj": "rowwise",
        "text_decoder.layers.*.ffn.fc1": "colwise",
        "text_decoder.layers.*.ffn.fc2": "rowwise",
    },
    "t5": T5,
    "t5gemma": {
        "decoder.layers.*.cross_attn.q_proj": "colwise:head_dim",
        "decoder.layers.*.cross_attn.k_proj": "kv_colwise:head_dim",
        "decoder.layers.*.cross_attn.v_proj": "kv_colwise:head_dim",
        "decoder.layers.*.cross_attn.o_proj": "rowwise",
    },
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
    "trocr": BART | SIZED_DECODER,
    "ultrabert": {"head.linear1": TRANSFORM, "head.linear2": TRANSFORM},
    "umt5": T5,
    "whisper": BART,
    "xglm": GPT_LIKE_BART,
    "xlm": XLM,
    "xlm-roberta": BERT,
    "xlm-roberta-xl": BERT
    | {
        "encoder.layer.*.attention.self_attn_layer_norm": BEFORE,
        "encoder.layer.*.crossattention.self_attn_layer_norm": BEFORE,
    },
    "xlnet": {
        "mask_emb": "replicate:one vector, a whole activation",
        "layer.*.rel_attn": "residual_inside:layer_norm",
        "layer.*.rel_attn.q": "cut:1",
        "layer.*.rel_attn.k": "cut:1",
        "layer.*.rel_attn.v": "cut:1",
        "layer.*.rel_attn.o": "cut:1",
        "layer.*.rel_attn.r": "cut:1",
        "layer.*.rel_attn.r_r_bias": "cut:0",
        "layer.*.rel_attn.r_s_bias": "cut:0",
        "layer.*.rel_attn.r_w_bias": "cut:0",
        "layer.*.rel_attn.seg_embed": "cut:1",
        "layer.*.rel_attn.layer_norm": AFTER,
        "layer.*.ff.layer_1": "colwise",
        "layer.*.ff.layer_2": "rowwise",
        "layer.*.ff.layer_norm": AFTER,
    },
    "yoso": BERT,
    "xmod": BERT
    | {
        "encoder.layer.*.output.adapter_layer_norm": AFTER,
        # One adapter for each language; further languages need rows like these.
        "encoder.layer.*.output.adapter_modules.en_XX.dense1": "colwise",
        "encoder.layer.*.output.adapter_modules.en_XX.dense2": "rowwise",
    },
}
"""Tensor plans that Hugging Face lacks, has wrong, or leaves without the weights that stay whole. Dictionaries only."""
