"""Sizes in a model's configuration that no model can have, by the names that the families of transformers share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from trainer.errors import Problem

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
"""Sizes of parts that a model may lack, which a 0 says: shared experts, layers that predict further tokens."""

_LAYERS = re.compile(r"(num_\w*layers|n_layers?|encoder_layers|decoder_layers)")
"""Numbers of layers, each of which is built as objects before anything else is known of the model."""

_MAX_LAYERS = 10_000
_MOST = 2**31
"""Of every other size."""

_UNTRAINED_PARTS = ("vision", "audio", "image", "speech")
"""Parts of a larger model that a language model is not made of."""

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""What families call the number of a mixture's experts."""

EXPERTS_PER_TOKEN = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts",
)  # fmt: skip
"""What they call the number of those that a token is routed to."""


def qualified_key(where: str, key: str) -> str:
    """A key of the configuration found at `where`: a file, or a dotted key."""
    return f"{where}: {key}" if where.endswith(".json") else f"{where}.{key}"


def size_problems(raw: Mapping[str, Any], where: str, above: str = "") -> Iterator[Problem]:
    """Sizes in a configuration that are no whole numbers, negative, or 0 where a model has at least one.

    Args:
        raw: as it was written. where: it was found. above: dotted key of `raw` itself, within that.
    """
    for name, value in ((str(name), value) for name, value in raw.items()):
        key = f"{above}.{name}" if above else name
        if isinstance(value, Mapping):
            if not any(part in name for part in _UNTRAINED_PARTS):
                yield from size_problems(value, where, key)
            continue
        least = 1 if _POSITIVE.fullmatch(name) else 0 if _NON_NEGATIVE.fullmatch(name) else None
        if least is None or value is None:
            continue
        values = value if isinstance(value, list) and value else [value]
        if not all(_is_whole(number) and number >= least for number in values):
            yield Problem(qualified_key(where, key), f"must be a whole number of at least {least} (got {value!r})")
            continue
        most = _MAX_LAYERS if _LAYERS.fullmatch(name) else _MOST
        if max(values) > most:
            yield Problem(qualified_key(where, key), f"must be at most {most} (got {max(values):.3g})")


def _is_whole(value: Any) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())


def relation_problems(config: Any, raw: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """Sizes that contradict each other.

    Args:
        config: the Hugging Face configuration that the family makes of `raw`.
    """
    text = config.get_text_config(decoder=True)
    nested = next((key for key, part in raw.items() if isinstance(part, Mapping) and key.startswith("text")), "")
    given = {**raw, **raw[nested]} if nested else raw

    def spelled(name: str) -> str:
        names = (name, *(alias for alias, real in text.attribute_map.items() if real == name))
        real = text.attribute_map.get(name, name)
        found = next((each for each in (*names, real) if each in given), name)
        return qualified_key(where, f"{nested}.{found}" if nested and found not in raw else found)

    hidden, heads = _size(text, "hidden_size"), _size(text, "num_attention_heads")
    key_value = _size(text, "num_key_value_heads")
    if heads and key_value and heads % key_value and "num_key_value_heads" in given:
        yield Problem(spelled("num_key_value_heads"), f"must divide the {heads} attention heads (got {key_value})")
    derived = "head_dim" not in given and _size(text, "head_dim") in (
        None,
        hidden // heads if hidden and heads else None,
    )
    if hidden and heads and hidden % heads and hasattr(text, "head_dim") and derived:
        yield Problem(
            spelled("hidden_size"),
            f"must be a multiple of the number of attention heads, {heads}, where head_dim is not set (got {hidden})",
        )
    experts = next((size for name in EXPERTS if (size := _size(text, name))), None)
    for name in EXPERTS_PER_TOKEN:
        chosen = _size(text, name)
        available = (experts or 0) + (_size(text, "zero_expert_num") or 0)
        if experts and experts > 1 and chosen is not None and not 1 <= chosen <= available:  # one expert: dense
            yield Problem(spelled(name), f"must be between 1 and the number of experts, {available} (got {chosen})")
            return


def _size(config: Any, name: str) -> int | None:
    """An attribute that is one whole number; None if there is none, or one for each layer."""
    try:
        value = getattr(config, name, None)
    except Exception:  # gemma4 refuses to say one number for layers that differ
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None
