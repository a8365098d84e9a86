"""What the plans have in common: names that many families share, and the reasons for which a matrix stays whole."""

from __future__ import annotations

Rows = dict[str, str | None]

UNITS = {
    "q_proj": "colwise:head_dim",
    "k_proj": "kv_colwise:head_dim",
    "v_proj": "kv_colwise:head_dim",
}
"""What the outputs of the attention projections in Hugging Face's own plans consist of."""

ROUTER = "replicate:a router; every rank needs all scores"
POSITIONS = "replicate:positions, added to whole activations"

COMMON: dict[str, str] = {
    "layers.*.mlp.gate": ROUTER,
    "layers.*.mlp.router": ROUTER,
    "layers.*.mlp.shared_expert_gate": "replicate:one output, which multiplies a whole activation",
}
"""Rows for modules that many families call alike; used where they match and the family's plan has no row."""

WHOLE_SEQUENCES = {
    "albert", "blt", "ctrl", "dbrx", "deepseek_v4", "esm", "falcon_h1", "flaubert", "gemma3n_text", "gemma4",
    "gemma4_text", "gpt_neox_japanese", "hy_v4", "inkling2_text", "inkling_text", "llama4", "llama4_text",
    "longcat_flash", "longt5", "megatron-bert", "mllama", "mllama_text_model", "mt5", "openai-gpt", "pegasus_x",
    "roberta-prelayernorm", "t5", "umt5", "xlm", "xlm-roberta-xl", "xmod",
}  # fmt: skip
"""Families whose layers use whole sequences outside attention and MLP (positions, masks, several streams, one layer
many times), so that sequence parallelism would be wrong."""
