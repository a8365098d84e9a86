"""Shapes of a family: variations of the tiny model, so that a proof does not depend on one choice of sizes.

The generic shape divides everywhere: 4 of 8 key/value heads, heads as wide as hidden / heads, powers of two. The
other shapes reveal faults that these sizes hide: one key/value head, heads of another width, widths and a vocabulary
that do not divide, ties and biases reversed, and every boolean of the configuration that changes which weights
there are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from tools.parity.families import CLASSES, Family
from tools.parity.gradient_proof import computes, tiny_config
from tools.parity.shrink import COUPLED

Fields = dict[str, Any]

GENERIC = "generic"
HEADS = "one key/value head"
FEW_HEADS = "two key/value heads"
WIDTH = "wide heads"
UNEVEN = "uneven"
OPPOSITE = "ties and biases reversed"
SHAPES = (GENERIC, HEADS, FEW_HEADS, WIDTH, UNEVEN, OPPOSITE)
"""The shapes of every family whose configuration has the fields that they change."""

FLIP = "flip "
"""Prefix of the name of a shape in which one boolean of the configuration is flipped."""

KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_n_heads")
HEAD_WIDTHS = ("head_dim", "d_kv", "attention_head_size", "d_head", "dim_head", "v_head_dim", "attention_head_dim")
WIDTHS = {
    "intermediate_size": 124,
    "ffn_dim": 124,
    "d_ff": 124,
    "dff": 124,
    "dim_ff": 124,
    "n_inner": 124,
    "d_inner": 124,
    "encoder_ffn_dim": 124,
    "decoder_ffn_dim": 124,
    "ffn_hidden_size": 124,
    "feed_forward_size": 124,
    "dense_intermediate_size": 124,
    "moe_intermediate_size": 36,
    "shared_expert_intermediate_size": 36,
    "expert_ffn_hidden_size": 36,
    "shared_intermediate_size": 36,
    "shared_experts_intermediate_size": 36,
    "moe_shared_expert_intermediate_size": 36,
    "ffn_config": {"ffn_hidden_size": 124},
}
"""Two tensor ranks get columns that are no multiple of 16 bytes in fp32, four an odd number; experts too."""

VOCABULARY = 257

_SMALL_HEAD = 8
"""Width of a head in the generic shape."""

NOT_STRUCTURE = ("is_encoder_decoder", "add_cross_attention", "cross_attention", "use_cache", "torchscript")
"""Booleans that select another type of model, whose inputs no task provides."""


@dataclass(frozen=True)
class Variation:
    """A family in one shape."""

    family: Family
    """Family with the fields of the shape."""

    shape: str
    changed: tuple[str, ...]
    """Fields of the configuration that differ from the generic shape, as `name=value`."""


def variations(family: Family) -> Iterator[Variation]:
    """Yield the generic shape of a family, then every other that changes its tiny model and can be built."""
    yield Variation(family, GENERIC, ())
    try:
        generic = _BuiltModel(family)
    except Exception:  # not built: the generic row has the reason
        return
    for shape in SHAPES[1:]:
        variation = next(
            filter(None, (_build_variation(family, shape, fields) for fields in _CANDIDATES[shape](generic))), None
        )
        if variation is not None:
            yield variation
    for fields in _flipped_fields(generic):
        variation = _build_variation(family, FLIP + next(_field_names(fields)), fields)
        if variation is not None and _BuiltModel(variation.family).shapes != generic.shapes:
            yield variation


class _BuiltModel:
    """A family's tiny model on the meta device."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.config = tiny_config(family)
        with torch.device("meta"):
            model: nn.Module = CLASSES[family.task].from_config(self.config)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def parts(self) -> Iterator[tuple[str, PreTrainedConfig]]:
        """Yield (name, configuration) of those that define the language model; "" is the full one."""
        yield "", self.config
        text = self.config.get_text_config(decoder=True)
        for name in getattr(self.config, "sub_configs", None) or {}:
            if getattr(self.config, name, None) is text and text is not self.config:
                yield name, text


def _build_variation(family: Family, shape: str, fields: Fields) -> Variation | None:
    varied = replace(
        family,
        variant=f"{family.variant}; {shape}" if family.variant else shape,
        fields=_merged(family.fields, fields),
    )
    try:
        _BuiltModel(varied)
        computes(varied)  # sizes that the constructor accepts and the forward pass cannot compute
    except Exception:  # the families' validators raise many types
        return None
    return Variation(varied, shape, tuple(_field_names(fields)))


def _merged(base: Fields, over: Fields) -> Fields:
    return base | {
        key: base[key] | value if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in over.items()
    }


def _field_names(fields: Fields, prefix: str = "") -> Iterator[str]:
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from _field_names(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={value}"


def _settable(config: PreTrainedConfig, key: str) -> Any:
    """Return the value of a constructor argument by name; None if there is no such argument."""
    if any(isinstance(vars(base).get(key), property) for base in type(config).__mro__) or key in config.attribute_map:
        return None
    try:
        return getattr(config, key, None)
    except Exception:  # some families refuse to read it
        return None


def _in_section(part: str, fields: Fields) -> Fields:
    return {part: fields} if part else fields


def _fewer_heads_fields(generic: _BuiltModel, counts: tuple[int, ...] = (1, 2)) -> Iterator[Fields]:
    """Yield numbers of key/value heads that divide the query heads, the smallest first."""
    row = COUPLED.get(generic.config.model_type, {})
    for part, config in generic.parts():
        for holder in ("", "attn_config"):
            inner = getattr(config, holder, None) if holder else config
            for key in KEY_VALUE_HEADS:
                heads = _settable(inner, key) if isinstance(inner, PreTrainedConfig) else None
                for count in counts if isinstance(heads, int) else ():
                    fields = {key: count}
                    if count < heads:
                        yield _in_section(part, {holder: row.get(holder, {}) | fields} if holder else fields)


def _is_left_out(config: PreTrainedConfig, key: str) -> bool:
    """Return whether a field has no value, so that the family derives one."""
    fields = {field.name for field in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else set()
    try:
        return key in fields and key not in config.attribute_map and getattr(config, key, 0) is None
    except Exception:  # some families refuse to read it
        return False


def _wide_heads_fields(generic: _BuiltModel) -> Iterator[Fields]:
    for part, config in generic.parts():
        for key in HEAD_WIDTHS:
            width = _settable(config, key)
            if width is None and _is_left_out(config, key):
                width = _SMALL_HEAD
            if isinstance(width, int):
                yield from (_in_section(part, {key: wide}) for wide in (2 * width, 3 * width, width // 2))


def _uneven_fields(generic: _BuiltModel) -> Iterator[Fields]:
    for part, config in generic.parts():
        widths = {}
        for key, width in WIDTHS.items():
            value = _settable(config, key)
            if isinstance(width, int) and (isinstance(value, int) or _is_left_out(config, key)):
                widths[key] = width
            elif isinstance(value, list) and value and isinstance(width, int) and isinstance(value[0], int):
                widths[key] = [width] * len(value)
            elif isinstance(value, PreTrainedConfig) and isinstance(width, dict):
                widths[key] = COUPLED.get(generic.config.model_type, {}).get(key, {}) | width
        vocabulary = {"vocab_size": VOCABULARY} if isinstance(_settable(config, "vocab_size"), int) else {}
        for fields in (widths | vocabulary, vocabulary, widths):
            if fields:
                yield _in_section(part, fields)


def _opposite_fields(generic: _BuiltModel) -> Iterator[Fields]:
    for part, config in generic.parts():
        biases = {key: not value for key, value in _boolean_fields(config) if "bias" in key}
        tied = getattr(config, "tie_word_embeddings", None) if part == "" else None
        if isinstance(tied, bool):
            yield {"tie_word_embeddings": not tied, **_in_section(part, biases)}
            yield {"tie_word_embeddings": not tied}
        if biases:
            yield _in_section(part, biases)


def _boolean_fields(config: PreTrainedConfig) -> Iterator[tuple[str, bool]]:
    for key in sorted(vars(config)):
        value = _settable(config, key)
        if isinstance(value, bool) and not key.startswith("_") and key not in NOT_STRUCTURE:
            yield key, value


def _flipped_fields(generic: _BuiltModel) -> Iterator[Fields]:
    for part, config in generic.parts():
        for key, value in _boolean_fields(config):
            if key != "tie_word_embeddings":
                yield _in_section(part, {key: not value})


_CANDIDATES: dict[str, Callable[[_BuiltModel], Iterator[Fields]]] = {
    HEADS: _fewer_heads_fields,
    FEW_HEADS: lambda generic: _fewer_heads_fields(generic, (2,)),
    WIDTH: _wide_heads_fields,
    UNEVEN: _uneven_fields,
    OPPOSITE: _opposite_fields,
}
"""Fields to try for each shape, the best first; the first set that a model can be built with is used."""
