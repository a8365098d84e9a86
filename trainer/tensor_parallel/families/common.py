"""Shared parts of the plans: names that many families share, and the reasons why a matrix is replicated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedConfig

from trainer.tensor_parallel.styles import Column, KeyValueColumn, Replicated, ReplicatedSumGradient, Row, Style

Entries = dict[str, Style | tuple[Style, ...] | None]
"""Styles by name; None removes Hugging Face's entry of that name."""


@dataclass(frozen=True)
class Variant:
    """Entries for the configurations of a family that have certain values; they override the family's own."""

    model_type: str
    values: Mapping[str, object]
    entries: Entries

    def matches(self, config: PreTrainedConfig) -> bool:
        """Return whether a configuration is of this variant."""
        return config.model_type == self.model_type and all(
            str(getattr(config, name, None)) == str(value) for name, value in self.values.items()
        )


UNITS: dict[str, Style] = {
    "q_proj": Column(unit="head_dim"),
    "k_proj": KeyValueColumn(unit="head_dim"),
    "v_proj": KeyValueColumn(unit="head_dim"),
}
"""Composition of the outputs of the attention projections in Hugging Face's own plans."""

ROUTER = Replicated("a router; every rank needs all scores")
POSITIONS = Replicated("positions, added to full activations")
TYPES = Replicated("segment vectors, added to full activations")
AFTER = Replicated("after the exit of the block")
BEFORE = Replicated("before the entrance to the block")
INDEXER = Replicated("an indexer; it picks the tokens for all heads, and is not trained")
PER_HEAD = ReplicatedSumGradient()
"""A full parameter that each rank uses on its own heads or channels."""

ATTENTION: Entries = {
    "layers.*.self_attn.q_proj": Column(unit="head_dim"),
    "layers.*.self_attn.k_proj": KeyValueColumn(unit="head_dim"),
    "layers.*.self_attn.v_proj": KeyValueColumn(unit="head_dim"),
    "layers.*.self_attn.o_proj": Row(),
}

SHARED_EXPERTS: Entries = {
    "layers.*.mlp.shared_experts.gate_proj": Column(),
    "layers.*.mlp.shared_experts.up_proj": Column(),
    "layers.*.mlp.shared_experts.down_proj": Row(),
}

COMMON: dict[str, Style] = {
    "layers.*.mlp.gate": ROUTER,
    "layers.*.mlp.router": ROUTER,
    "layers.*.mlp.shared_expert_gate": Replicated("one output, which multiplies a full activation"),
}
"""Entries for modules with the same name in many families; used if they match and the family's plan has no entry."""

FULL_SEQUENCES = {
    "albert",
    "blt",
    "ctrl",
    "dbrx",
    "deepseek_v4",
    "esm",
    "falcon_h1",
    "flaubert",
    "gemma3n_text",
    "gemma4",
    "gemma4_text",
    "gpt_neox_japanese",
    "hy_v4",
    "inkling2_text",
    "inkling_text",
    "llama4",
    "llama4_text",
    "longcat_flash",
    "longt5",
    "megatron-bert",
    "mllama",
    "mllama_text_model",
    "mt5",
    "openai-gpt",
    "pegasus_x",
    "roberta-prelayernorm",
    "t5",
    "umt5",
    "xlm",
    "xlm-roberta-xl",
    "xmod",
}
"""Families whose layers use full sequences outside attention and MLP (positions, masks, several streams, one layer
many times), so that sequence parallelism would be wrong."""
