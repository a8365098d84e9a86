"""Impossible sizes in a model's configuration, by the keys that families of transformers share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

from trainer.errors import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_POSITIVE = re.compile(
    r"(num_hidden_layers|num_layers|num_decoder_layers|decoder_layers|n_layers?"
    r"|hidden_size|d_model|n_embd|emb_dim|embed_dim|embedding_size"
    r"|num_attention_heads|num_heads|n_heads?|decoder_attention_heads|num_key_value_heads|num_kv_heads|kv_n_heads"
    r"|head_dim|d_kv|d_head|dim_head|attention_head_size|attention_head_dim|kv_channels"
    r"|intermediate_size|ffn_dim|decoder_ffn_dim|ffn_hidden_size|d_ff|dff|dim_ff|d_inner|n_inner|feed_forward_size"
    r"|vocab_size|max_position_embeddings|n_positions|max_seq_len)"
)
"""Sizes that are at least 1 in every family."""

_NON_NEGATIVE = re.compile(
    r"num_\w*layers|encoder_layers|\w*heads|\w*head_dim|\w*hidden_size|\w*intermediate_size|\w*ffn_dim|\w*vocab_size"
    r"|\w*experts|\w*experts_per_tok(en)?|(moe_)?top_?k"
)
"""Sizes of optional parts, which are 0 where the part is absent: shared experts, layers for multi-token prediction."""

_LAYERS = re.compile(r"(num_\w*layers|n_layers?|encoder_layers|decoder_layers)")
"""Numbers of layers, which become objects before anything else of the model is checked."""

_MAX_LAYERS = 10_000
_MAX_SIZE = 2**31
"""Maximum of every size but the number of layers."""

_UNTRAINED_PARTS = ("vision", "audio", "image", "speech")
"""Parts of a multimodal configuration that the language model does not use."""

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Keys for the number of experts."""

EXPERTS_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "top_k_experts",
)
"""Keys for the number of experts that a token is routed to."""


def qualified_key(source: str, key: str) -> str:
    """Return a key of the configuration in `source`, a file or a dotted key, for messages."""
    return f"{source}: {key}" if source.endswith(".json") else f"{source}.{key}"


def size_problems(raw: Mapping[str, Any], source: str, above: str = "") -> Iterator[Problem]:
    """Yield sizes that are not whole numbers, negative, 0 where a model has at least one, or absurdly large.

    Args:
        raw: The configuration as it was written.
        source: The file or key that it comes from.
        above: Dotted key of `raw` itself within the configuration.
    """
    for name, value in ((str(name), value) for name, value in raw.items()):
        key = f"{above}.{name}" if above else name
        if isinstance(value, Mapping):
            if not any(part in name for part in _UNTRAINED_PARTS):
                yield from size_problems(value, source, key)
            continue
        minimum = 1 if _POSITIVE.fullmatch(name) else 0 if _NON_NEGATIVE.fullmatch(name) else None
        if minimum is None or value is None:
            continue
        values = value if isinstance(value, list) and value else [value]
        if not all(_is_whole(number) and number >= minimum for number in values):
            reason = f"must be a whole number of at least {minimum} (got {value!r})"
            yield Problem(qualified_key(source, key), reason)
            continue
        maximum = _MAX_LAYERS if _LAYERS.fullmatch(name) else _MAX_SIZE
        if max(values) > maximum:
            yield Problem(qualified_key(source, key), f"must be at most {maximum} (got {max(values):.3g})")


def _is_whole(value: object) -> TypeGuard[int | float]:
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())


def relation_problems(config: PreTrainedConfig, raw: Mapping[str, Any], source: str) -> Iterator[Problem]:
    """Yield sizes that contradict each other.

    Args:
        config: The Hugging Face configuration that the family makes of `raw`.
        raw: The configuration as it was written.
        source: The file or key that it comes from.
    """
    text = config.get_text_config(decoder=True)
    nested = next((key for key, part in raw.items() if isinstance(part, Mapping) and key.startswith("text")), "")
    written = {**raw, **raw[nested]} if nested else raw

    def written_key(name: str) -> str:
        """Return the user's spelling of an attribute, which a family may have under several names."""
        aliases = (alias for alias, attribute in text.attribute_map.items() if attribute == name)
        spellings = (name, *aliases, text.attribute_map.get(name, name))
        key = next((spelling for spelling in spellings if spelling in written), name)
        return qualified_key(source, f"{nested}.{key}" if nested and key not in raw else key)

    hidden, heads = _size(text, "hidden_size"), _size(text, "num_attention_heads")
    key_value_heads = _size(text, "num_key_value_heads")
    if heads and key_value_heads and heads % key_value_heads and "num_key_value_heads" in written:
        reason = f"must divide the {heads} attention heads (got {key_value_heads})"
        yield Problem(written_key("num_key_value_heads"), reason)
    derived_head_dim = hidden // heads if hidden and heads else None
    is_derived = "head_dim" not in written and _size(text, "head_dim") in (None, derived_head_dim)
    if hidden and heads and hidden % heads and hasattr(text, "head_dim") and is_derived:
        reason = f"must be a multiple of the number of attention heads, {heads}, if head_dim is unset (got {hidden})"
        yield Problem(written_key("hidden_size"), reason)
    experts = next((size for name in EXPERTS if (size := _size(text, name))), None)
    for name in EXPERTS_PER_TOKEN:
        routed = _size(text, name)
        available = (experts or 0) + (_size(text, "zero_expert_num") or 0)
        if experts and experts > 1 and routed is not None and not 1 <= routed <= available:  # one expert: a dense layer
            reason = f"must be between 1 and the number of experts, {available} (got {routed})"
            yield Problem(written_key(name), reason)
            return


def _size(config: PreTrainedConfig, name: str) -> int | None:
    """Return an attribute that is one whole number; None if it is absent, or differs between layers."""
    try:
        value = getattr(config, name, None)
    except Exception:  # gemma4 refuses to return one number for layers that differ
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None
