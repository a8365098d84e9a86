"""Numbers of a model's configuration that rules and other packages need."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trainer.compat.transformers.configuration import supports_sdpa
from trainer.config.causal_attention import causal_setting
from trainer.config.model_config import model_classes
from trainer.errors import ConfigError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class ModelFacts:
    """Properties of a model that follow from its configuration."""

    model_type: str
    vocabulary_size: int
    hidden_size: int | None
    """None for families whose layers have several."""

    max_positions: int | None
    """Longest sequence that the model supports; None if it is unbounded."""

    attention_heads: int | None
    """Attention heads; the greatest common divisor where layers differ; None without such a key."""

    required_length: int | None = None
    """The only sequence length that the model can be trained on; None for nearly all families."""

    special_token_ids: frozenset[int] = frozenset()
    """Token ids that the configuration names: end of text, padding, placeholders of images."""

    causal_setting: tuple[str, Any] | None = None
    """The configuration key that prevents causal attention, and the value to set; None if none does."""

    min_block_sparse_length: int = 0
    """Tokens below which block-sparse attention turns itself off for good (BigBird)."""

    has_load_balancing_loss: bool = False
    """Whether the model adds a load-balancing loss of its experts, which depends on the number of tokens."""


def _special_token_ids(config: PreTrainedConfig) -> frozenset[int]:
    ids: set[int] = set()
    for key, value in {**config.to_dict(), **config.get_text_config(decoder=True).to_dict()}.items():
        if key.endswith(("_token_id", "_token_ids", "_token_index")):
            ids.update(token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int))
    return frozenset(ids)


def _min_block_sparse_length(config: PreTrainedConfig) -> int:
    if config.model_type != "big_bird" or getattr(config, "attention_type", None) != "block_sparse":
        return 0
    return int((5 + 2 * config.num_random_blocks) * config.block_size) + 1


def default_attention(config: PreTrainedConfig, task: str) -> Literal["sdpa", "eager"]:
    """Return `sdpa` if the family supports it. Imports the family's code, which checking a configuration does not."""
    return "sdpa" if supports_sdpa(model_classes(task)[type(config)]) else "eager"


def _attention_heads(config: PreTrainedConfig) -> list[int]:
    """Return the attention heads of the model, or of each layer where layers differ."""
    try:
        heads = getattr(config, "num_attention_heads", None)
    except Exception:  # transformers refuses a model-wide read of a value that differs between layers
        heads = [getattr(layer, "num_attention_heads", None) for layer in config.per_layer_config]
    values = heads if isinstance(heads, list | tuple) else [heads]
    return [value for value in values if isinstance(value, int) and value > 0]


def model_facts(config: PreTrainedConfig) -> ModelFacts:
    """Collect the facts of a configuration.

    Raises:
        ConfigError: It has no vocabulary.
    """
    text = config.get_text_config(decoder=True)
    vocabulary_size = getattr(text, "vocab_size", None)
    if not isinstance(vocabulary_size, int):
        reason = f"the configuration of '{config.model_type}' has no vocab_size"
        raise ConfigError(Problem("model", reason, "Choose another family"))
    hidden_size = getattr(text, "hidden_size", None)
    positions = getattr(text, "max_position_embeddings", None)
    axial_shape = getattr(text, "axial_pos_shape", None) if getattr(text, "axial_pos_embds", False) else None
    return ModelFacts(
        model_type=str(config.model_type),
        vocabulary_size=vocabulary_size,
        hidden_size=hidden_size if isinstance(hidden_size, int) else None,
        max_positions=positions if isinstance(positions, int) and positions > 0 else None,
        attention_heads=math.gcd(*_attention_heads(text)) or None,
        required_length=math.prod(axial_shape) if axial_shape else None,
        special_token_ids=_special_token_ids(config),
        causal_setting=causal_setting(config),
        min_block_sparse_length=_min_block_sparse_length(config),
        has_load_balancing_loss=bool(getattr(text, "output_router_logits", False)),
    )
