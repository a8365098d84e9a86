"""The table of families for the support matrix and the tests of tensor parallelism.

All causal language models of transformers are in it by themselves; the table adds variants of a
family (another attention arrangement), other tasks, and why a type is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

Task = Literal["causal_lm", "masked_lm", "seq2seq_lm"]

CLASSES: dict[str, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "masked_lm": AutoModelForMaskedLM,
    "seq2seq_lm": AutoModelForSeq2SeqLM,
}
"""The auto class of each task."""


@dataclass(frozen=True)
class Family:
    """One row: a type of model, made tiny by `tools.parity.shrink.tiny`."""

    model_type: str
    task: Task = "causal_lm"
    variant: str = ""
    """Name of the variant; empty for the family's default."""

    fields: dict[str, Any] = field(default_factory=dict)
    """Configuration of the variant."""

    def __str__(self) -> str:
        task = "" if self.task == "causal_lm" else f" {self.task}"
        return f"{self.model_type}{task}" + (f" ({self.variant})" if self.variant else "")


VARIANTS = [
    Family("big_bird", variant="full attention", fields={"attention_type": "original_full"}),
    Family("big_bird", "masked_lm", "full attention", {"attention_type": "original_full"}),
    Family("bigbird_pegasus", "seq2seq_lm", "full attention", {"attention_type": "original_full"}),
    Family("falcon", variant="grouped", fields={"new_decoder_architecture": True, "num_kv_heads": 4}),
    Family(
        "falcon",
        variant="grouped, one norm",
        fields={"new_decoder_architecture": True, "num_kv_heads": 4, "num_ln_in_parallel_attn": 1},
    ),
    Family("falcon", variant="per head", fields={"multi_query": False, "num_kv_heads": 8}),
    Family("falcon", variant="ALiBi", fields={"alibi": True}),
    Family("gpt_bigcode", variant="multi-head", fields={"multi_query": False}),
    Family("gpt_neox", variant="no parallel residual", fields={"use_parallel_residual": False}),
    Family("stablelm", variant="parallel residual", fields={"use_parallel_residual": True}),
    Family("opt", variant="projected", fields={"word_embed_proj_dim": 32}),
]
"""Variants of families."""

MASKED: tuple[str, ...] = (
    "albert", "bart", "bert", "camembert", "convbert", "data2vec-text", "deberta", "deberta-v2",
    "distilbert", "electra", "ernie", "esm", "eurobert", "flaubert", "fnet", "gte", "jina_embeddings_v3", "layoutlm",
    "mbart", "megatron-bert", "modernbert", "mpnet", "mvp", "nomic_bert", "rembert", "roberta",
    "roberta-prelayernorm", "roc_bert", "roformer", "tapas", "ultrabert", "xlm", "xlm-roberta", "xlm-roberta-xl",
    "xmod", "yoso",
)  # fmt: skip
"""Encoders, as masked language models."""

SEQUENCE_TO_SEQUENCE: tuple[str, ...] = (
    "bart", "blenderbot", "blenderbot-small", "fsmt", "longt5", "m2m_100", "marian", "mbart",
    "mt5", "mvp", "pegasus", "pegasus_x", "plbart", "seamless_m4t", "t5", "t5gemma", "umt5",
)  # fmt: skip
"""Encoder-decoders."""

FAMILIES: list[Family] = [
    *(Family(model_type) for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    *VARIANTS,
    *(Family(model_type, "masked_lm") for model_type in MASKED),
    *(Family(model_type, "seq2seq_lm") for model_type in SEQUENCE_TO_SEQUENCE),
]
