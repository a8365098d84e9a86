"""Keys of a folder's weights that the model has no tensor for: another class's, or a mistake."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from trainer.errors import ConfigError, Problem

FLOATING_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
"""safetensors' names of the dtypes in which floating-point weights are stored unquantized."""

_QUANTIZED_KEY = re.compile(
    r"(^|[._:])(qweight|qzeros|qscales?|scales|g_idx|SCB|weight_format|W_q|Qidxs|codebooks|codes|centroids|qdata"
    r"|(nested_)?absmax|(nested_)?quant_map|quant_state(\..*)?|weight_(packed|shape|zero_point|g_idx|blocks|offset)"
    r"|(weight|input|output|activation|[qkv])_(global_)?scales?(_inv|_ub|_2)?|input_zero_point|scale_inv)$"
    r"|_(blocks|scales|scale_inv)$|:_?(data|scale|zero_point|shift)$|weight\._(data|scale|shift|packed)$"
)
"""Last part of a key under which a quantization method keeps packed values, scales, zero points or tables."""

_OLD_CONSTANTS = re.compile(
    r"(rotary_emb\.inv_freq|(^|\.)position_ids|\.att(n|ention)\.(?P<mask>bias|masked_bias|causal_mask)|\.version)$"
)
"""Constants that older versions of transformers saved as buffers and the present one computes."""

SHOWN = 10
"""Keys that a message names."""

Unmatched = Callable[[PreTrainedModel, list[str]], list[str]]
"""Those of the keys that match no tensor of a model, by transformers' own renamings."""


@dataclass(frozen=True)
class Stored:
    """What a file's header says about a tensor."""

    dtype: str
    shape: tuple[int, ...]


def shown(keys: Iterable[str], count: int = SHOWN) -> str:
    """The first few keys, and how many more there are."""
    keys = list(keys)
    return ", ".join(keys[:count]) + (f" and {len(keys) - count} more" if len(keys) > count else "")


def refuse_quantized(path: str, matched: dict[str, bool], stored: dict[str, Stored]) -> None:
    """Refuse weights that are stored in a packed form, which would be read as other numbers than they stand for.

    Args:
        path: of the folder. matched: for each key with a place in the model, whether the model's tensor is floating
            point. stored: headers of all tensors in the folder by key.

    Raises:
        ConfigError: naming the first keys.
    """
    packed = [key for key, floating in matched.items() if floating and stored[key].dtype not in FLOATING_DTYPES]
    scales = [key for key in stored if key not in matched and _QUANTIZED_KEY.search(key)]
    if packed or scales:
        dtypes = {stored[key].dtype for key in packed}
        stands = f"{len(packed)} weights stored as {', '.join(sorted(dtypes))}" if packed else ""
        scaled = f"{len(scales)} scales or packed tensors" if scales else ""
        raise ConfigError(
            Problem(
                "model.path",
                f"the weights in '{path}' are quantized, and only unquantized ones can be trained "
                f"(got {' and '.join(filter(None, (stands, scaled)))}: {shown([*packed, *scales])})",
                DEQUANTIZE,
            )
        )


DEQUANTIZE = "Dequantize the model and save it with `save_pretrained`, or use the unquantized repository"


@dataclass(frozen=True)
class Leftovers:
    """Keys that the model has no tensor for."""

    skipped: list[str]
    """Belong to another class of the family, or are layers and constants that the family skips itself."""

    unexpected: list[str]
    """No class of the family has them."""


def classify(
    model: PreTrainedModel,
    config: PreTrainedConfig | None,
    keys: list[str],
    stored: dict[str, Stored],
    unmatched: Unmatched,
) -> Leftovers:
    """Divide leftover keys into those that the family knows and those that nobody does.

    Other classes of the family are constructed on the meta device, one after the other, until each key has a place.

    Args:
        config: of the folder, which may be of a larger model that `model` is a part of.
    """
    skips = _skipped_by_family(model)
    rest = [key for key in keys if not skips.search(key) and not _is_old_constant(key, stored[key])]
    for other in _classes_of_family(model, config) if rest else ():
        rest = unmatched(other, rest)
        if not rest:
            break
    unexpected = set(rest)
    return Leftovers([key for key in keys if key not in unexpected], rest)


def _skipped_by_family(model: PreTrainedModel) -> re.Pattern[str]:
    """Matches what transformers leaves out in silence, and layers for predicting several tokens (MTP) that lie behind
    the last layer, as DeepSeek and GLM store them."""
    patterns = sorted(model._keys_to_ignore_on_load_unexpected or ())
    text = model.config.get_text_config(decoder=True)
    layers, further = (getattr(text, key, None) for key in ("num_hidden_layers", "num_nextn_predict_layers"))
    if isinstance(layers, int) and isinstance(further, int):
        patterns += [rf"(^|\.)layers\.{number}\." for number in range(layers, layers + further)]
    return re.compile("|".join(f"({pattern})" for pattern in patterns) or "(?!)")


def _is_old_constant(key: str, stored: Stored) -> bool:
    """Whether a key is an old constant: causal masks [1, 1, length, length] are called `attn.bias`."""
    match = _OLD_CONSTANTS.search(key)
    return match is not None and (
        match.group("mask") != "bias" or (len(stored.shape) == 4 and stored.shape[:2] == (1, 1))
    )


def _classes_of_family(model: PreTrainedModel, config: PreTrainedConfig | None) -> Iterator[PreTrainedModel]:
    """Models of the family's other classes on the meta device, the folder's own class first."""
    configs: dict[type[PreTrainedConfig], PreTrainedConfig] = {}
    wholes = [each for each in (config, model.config) if each is not None]
    for each in (*wholes, *(whole.get_text_config(decoder=True) for whole in wholes)):
        configs.setdefault(type(each), each)
    architectures = getattr(config, "architectures", None) or ()
    named = [getattr(transformers, name, None) for name in architectures if isinstance(name, str)]
    modules = dict.fromkeys(kind.__module__ for kind in (type(model), *named) if isinstance(kind, type))
    inside = [kind for name in modules for kind in vars(sys.modules[name]).values()]
    for kind in dict.fromkeys(kind for kind in (*named, *inside) if isinstance(kind, type)):
        if not issubclass(kind, PreTrainedModel) or kind is type(model) or kind.config_class not in configs:
            continue
        try:
            with torch.device("meta"):
                other = kind(copy.deepcopy(configs[kind.config_class]))
        except Exception:  # a class that wants more than its configuration, or an abstract one
            continue
        yield other
