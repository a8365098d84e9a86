"""Keys in weight files that match no tensor of the model: those of another class of the family, or a mistake."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from trainer.compat.transformers.models import patterns_of_skipped
from trainer.errors import ConfigError, Problem
from trainer.model.weight_files import TensorHeader
from trainer.model.weight_targets import unmatched_keys

FLOATING_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
"""Dtypes of unquantized floating-point weights, by their names in safetensors."""

_QUANTIZED_KEY = re.compile(
    r"(^|[._:])(qweight|qzeros|qscales?|scales|g_idx|SCB|weight_format|W_q|Qidxs|codebooks|codes|centroids|qdata"
    r"|(nested_)?absmax|(nested_)?quant_map|quant_state(\..*)?|weight_(packed|shape|zero_point|g_idx|blocks|offset)"
    r"|(weight|input|output|activation|[qkv])_(global_)?scales?(_inv|_ub|_2)?|input_zero_point|scale_inv)$"
    r"|_(blocks|scales|scale_inv)$|:_?(data|scale|zero_point|shift)$|weight\._(data|scale|shift|packed)$"
)
"""Matches the end of keys under which quantization methods store packed values, scales, zero points or tables."""

_OLD_CONSTANTS = re.compile(
    r"(rotary_emb\.inv_freq|(^|\.)position_ids|\.att(n|ention)\.(?P<mask>bias|masked_bias|causal_mask)|\.version)$"
)
"""Matches constants that older versions of transformers saved as buffers and the present version computes."""

MAX_LISTED = 10
"""Keys that a message lists."""

_DEQUANTIZE = "Dequantize the model and save it with `save_pretrained`, or use the unquantized repository"


def list_keys(keys: Iterable[str], count: int = MAX_LISTED) -> str:
    """Return the first few keys, and the number of the remaining ones."""
    keys = list(keys)
    return ", ".join(keys[:count]) + (f" and {len(keys) - count} more" if len(keys) > count else "")


def refuse_quantized(path: str, is_floating: Mapping[str, bool], headers: Mapping[str, TensorHeader]) -> None:
    """Refuse weights in a packed form, whose stored values are not the weights.

    Args:
        path: of the folder.
        is_floating: whether the model's tensor is floating point, for each key that matches one.
        headers: of all tensors in the folder, by key.

    Raises:
        ConfigError: with the first keys.
    """
    packed = [key for key, floating in is_floating.items() if floating and headers[key].dtype not in FLOATING_DTYPES]
    scales = [key for key in headers if key not in is_floating and _QUANTIZED_KEY.search(key)]
    if not packed and not scales:
        return
    dtypes = ", ".join(sorted({headers[key].dtype for key in packed}))
    counts = [f"{len(packed)} weights stored as {dtypes}"] if packed else []
    counts += [f"{len(scales)} scales or packed tensors"] if scales else []
    raise ConfigError(
        Problem(
            "model.path",
            f"the weights in '{path}' are quantized, and only unquantized ones can be trained "
            f"(got {' and '.join(counts)}: {list_keys([*packed, *scales])})",
            _DEQUANTIZE,
        )
    )


@dataclass(frozen=True)
class UnmatchedKeys:
    """Keys that match no tensor of the model."""

    skipped: list[str]
    """Keys of another class of the family, or of layers and constants that the family itself skips."""

    unexpected: list[str]
    """Keys of no class of the family."""


def classify_unmatched(
    model: PreTrainedModel,
    config: PreTrainedConfig | None,
    keys: list[str],
    headers: Mapping[str, TensorHeader],
) -> UnmatchedKeys:
    """Divide keys that match no tensor of the model into those that the family knows and unexpected ones.

    The family's other classes are constructed on the meta device one after the other, until every key has matched.

    Args:
        model: whose tensors the keys do not match.
        config: of the folder, which may describe a larger model that `model` is a part of.
        keys: in the files.
        headers: by key.
    """
    skipped = _skipped_pattern(model)
    unexpected = [key for key in keys if not skipped.search(key) and not _is_old_constant(key, headers[key])]
    for other in _other_models(model, config) if unexpected else ():
        unexpected = unmatched_keys(other, unexpected)
        if not unexpected:
            break
    known = set(keys) - set(unexpected)
    return UnmatchedKeys([key for key in keys if key in known], unexpected)


def _skipped_pattern(model: PreTrainedModel) -> re.Pattern[str]:
    """Match the keys that transformers skips, and multi-token prediction layers after the last layer.

    DeepSeek and GLM store such layers.
    """
    patterns = patterns_of_skipped(model)
    text = model.config.get_text_config(decoder=True)
    layers, extra_layers = (getattr(text, key, None) for key in ("num_hidden_layers", "num_nextn_predict_layers"))
    if isinstance(layers, int) and isinstance(extra_layers, int):
        patterns += [rf"(^|\.)layers\.{number}\." for number in range(layers, layers + extra_layers)]
    return re.compile("|".join(f"({pattern})" for pattern in patterns) or "(?!)")


def _is_old_constant(key: str, header: TensorHeader) -> bool:
    """Whether a key is an old constant. Causal masks [1, 1, T, T] are called `attn.bias`, as true biases are."""
    match = _OLD_CONSTANTS.search(key)
    if match is None:
        return False
    return match.group("mask") != "bias" or (len(header.shape) == 4 and header.shape[:2] == (1, 1))


def _other_models(model: PreTrainedModel, config: PreTrainedConfig | None) -> Iterator[PreTrainedModel]:
    """Construct models of the family's other classes on the meta device, the class that the folder names first."""
    configs: dict[type[PreTrainedConfig], PreTrainedConfig] = {}
    roots = [root for root in (config, model.config) if root is not None]
    for root in (*roots, *(root.get_text_config(decoder=True) for root in roots)):
        configs.setdefault(type(root), root)
    names = [name for name in getattr(config, "architectures", None) or () if isinstance(name, str)]
    named = [cls for name in names if isinstance(cls := getattr(transformers, name, None), type)]
    modules = dict.fromkeys(cls.__module__ for cls in (type(model), *named))
    members = [member for name in modules for member in vars(sys.modules[name]).values() if isinstance(member, type)]
    for cls in dict.fromkeys((*named, *members)):
        if not issubclass(cls, PreTrainedModel) or cls is type(model) or cls.config_class not in configs:
            continue
        try:
            with torch.device("meta"):
                other = cls(copy.deepcopy(configs[cls.config_class]))
        except Exception:  # an abstract class, or one that needs more than its configuration
            continue
        yield other
