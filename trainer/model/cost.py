"""Cost of a model: parameters, FLOPs per token and bytes of model states, counted on the meta device."""

from __future__ import annotations

import copy
import inspect
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers import PreTrainedConfig, PreTrainedModel

from trainer.compat.torch.dispatch import Operation, pytree
from trainer.compat.torch.meta import MetaMode, matrix_flops
from trainer.config.model_sizes import EXPERTS, EXPERTS_PER_TOKEN
from trainer.model.meta import traceable
from trainer.tasks import example_ids

PEAK_FLOPS: dict[str, float] = {
    "A100": 312e12,
    "A10": 125e12,
    "B200": 2250e12,
    "GH200": 989.5e12,
    "H100": 989.5e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989.5e12,
    "H200 NVL": 835e12,
    "H800": 989.5e12,
    "H800 PCIe": 756e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "V100": 125e12,
}
"""Dense half-precision matrix FLOP/s by device, from the vendor's data sheet (without sparsity)."""


def peak_flops(device_name: str) -> float | None:
    """Return the peak FLOP/s of a device by its name; None if it is unknown."""
    words = set(re.split(r"[\s/-]+", device_name))
    known = [name for name in PEAK_FLOPS if words.issuperset(name.split())]
    return PEAK_FLOPS[max(known, key=len)] if known else None


@dataclass(frozen=True)
class ModelCost:
    """Numbers of the full model, independent of the layout."""

    parameters: int
    """Number of parameters; tied ones count once."""

    active_matrix_parameters: int
    """Parameters that each token is multiplied with: no embedding lookups, and of experts those it is routed to."""

    attention_flops_per_position: int
    """FLOPs in forward and backward for each pair of query and key, over all layers: 12 x width of the heads."""

    def flops_per_token(self, length: int) -> float:
        """Return the FLOPs of forward and backward for one token in a sequence of `length` tokens.

        6 x parameters + 12 x layers x width x length, as in PaLM (Chowdhery et al. 2022, appendix B): attention
        is counted in full, not halved for causality; recomputation is not counted.
        """
        return 6.0 * self.active_matrix_parameters + float(self.attention_flops_per_position) * length


def model_cost(model: PreTrainedModel) -> ModelCost:
    """Count the parameters and FLOPs of a model on the meta device.

    Two forward passes without values trace what the layers compute, so that layers that differ, run several times or
    not at all (an image encoder, cross-attention of a decoder) are counted as they run. A family that cannot be traced
    is counted by its modules and their attributes.
    """
    model = copy.deepcopy(model)  # a forward pass may change a model: RWKV rescales its weights when it is evaluated
    short, long = (_trace(model, length) for length in _LENGTHS)
    experts, share = _experts(model.config)
    head = getattr(model.get_output_embeddings(), "weight", None)
    active = 0.0 if head is None else float(prod(head.shape))
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter is head or isinstance(module, nn.Embedding) or parameter.dim() not in (2, 3):
                continue
            is_read = long is None or id(parameter) in long.read
            stacked = parameter.dim() == 3 and parameter.shape[0] == experts and not isinstance(module, nn.Conv1d)
            if stacked or (not is_read and "experts" in name.split(".")):
                active += prod(parameter.shape) * share
            elif is_read:
                active += prod(parameter.shape) * (1 if long is None else max(1, long.calls[module]))
    attention = 0.0 if short is None or long is None else _attention(model, short, long)
    return ModelCost(
        parameters=sum(prod(p.shape) for p in model.parameters()),
        active_matrix_parameters=round(active),
        attention_flops_per_position=round(attention) or _attention_by_attributes(model),
    )


_LENGTHS = (20, 40)
"""Tokens of the traced sequences: few, because some families loop over them, and not a usual dimension of a model."""

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_HEAD_DIM = ("head_dim", "attention_head_size", "d_head", "dim_head")


class _Trace(MetaMode):
    """Records the matrix products of a forward pass over one sequence of `length` tokens."""

    def __init__(self, length: int) -> None:
        self.length = length
        self._active: list[nn.Module] = []
        self.calls: Counter[nn.Module] = Counter()
        self.flops: Counter[nn.Module] = Counter()
        """FLOPs of matrix products along the sequence, by innermost module."""

        self.read: set[int] = set()
        """Identities of the parameters that operations read."""

    def dispatch(self, func: Operation, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """See `DispatchMode.dispatch`."""
        result = super().dispatch(func, args, kwargs)
        tensors = [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
        self.read.update(id(tensor) for tensor in tensors if isinstance(tensor, nn.Parameter))
        if self._active and any(self.length in tensor.shape[-2:] for tensor in tensors):
            self.flops[self._active[-1]] += matrix_flops(func, args, kwargs, result)
        return result

    def enter(self, module: nn.Module, args: object) -> None:
        self._active.append(module)
        self.calls[module] += 1

    def leave(self, module: nn.Module, args: object, output: object) -> None:
        self._active.pop()


def _trace(model: PreTrainedModel, longest: int) -> _Trace | None:
    """Trace one forward pass in evaluation mode; None if the family cannot run without values."""
    positions = _integers(model.config.get_text_config(decoder=True), "max_position_embeddings")
    length = min([longest, *(count * longest // _LENGTHS[1] for count in positions if count > 0)])
    trace = _Trace(length)
    arguments = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    handles = [register_module_forward_pre_hook(trace.enter), register_module_forward_hook(trace.leave)]
    try:
        with traceable(model), torch.no_grad(), trace:
            model.eval()(**example_ids(model, 1, length), **arguments)
    except Exception:  # operations without values raise many types
        return None
    finally:
        for handle in handles:
            handle.remove()
    return trace


def _attention(model: PreTrainedModel, short: _Trace, long: _Trace) -> float:
    """Return FLOPs in forward and backward per pair of query and key: the part that grows quadratically."""
    total = 0.0
    layers = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    for module, flops in long.flops.items():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and 0 <= layer < len(layers) and layers[layer] == "linear_attention":
            continue  # in chunks longer than the traced sequences
        ratio = long.length / short.length
        squared = (flops - ratio * short.flops[module]) / (long.length**2 - ratio * short.length**2)
        total += max(0.0, 3 * squared)
    return total


def _attention_by_attributes(model: PreTrainedModel) -> int:
    """Return the same from the numbers of heads that attention modules have as attributes."""
    total = 0
    for module in model.modules():
        heads = _first(module, _HEADS) or _first(getattr(module, "config", None), _HEADS)
        total += 12 * heads * _first(module, _HEAD_DIM) if "Attention" in type(module).__name__ else 0
    return total


def _experts(config: PreTrainedConfig) -> tuple[int, float]:
    """Return the number of experts, and the share of them that one token is routed to; (0, 1) without experts."""
    text = config.get_text_config(decoder=True)
    sources = [text, getattr(text, "ffn_config", None)]
    experts = next((n for source in sources if (n := _first(source, EXPERTS))), 0)
    chosen = next((c for source in sources for key in EXPERTS_PER_TOKEN if (c := _integers(source, key))), [])
    return experts, min(1.0, sum(chosen) / len(chosen) / experts) if experts and chosen else 1.0


def _integers(config: object, name: str) -> list[int]:
    """Return the integers of an attribute, one per layer where layers differ; none without the attribute."""
    try:
        value = getattr(config, name, None)
    except Exception:  # transformers refuses a model-wide read of a value that differs between layers
        value = [getattr(layer, name, None) for layer in getattr(config, "per_layer_config", ())]
    values = value if isinstance(value, list | tuple) else [value]
    return [number for number in values if isinstance(number, int) and not isinstance(number, bool)]


def _first(source: object, names: tuple[str, ...]) -> int:
    return next((number for name in names for number in _integers(source, name)), 0)


def state_bytes(parameters: int, *, stage: int, data_ranks: int, half: bool, moments: int = 2) -> dict[str, float]:
    """Estimate the bytes of model states on one rank under ZeRO.

    Source: Rajbhandari et al. 2020, table 1, as DeepSpeed implements it.

    Args:
        parameters: number of parameters in the rank's shard of the model.
        stage: ZeRO stage.
        data_ranks: ranks over which ZeRO partitions.
        half: whether weights are bf16 or fp16, with fp32 master weights.
        moments: fp32 tensors of the optimizer per parameter (AdamW 2).

    Returns:
        Bytes of weights, gradients, master weights and optimizer moments.
    """
    size = 2 if half else 4
    share = 1 / data_ranks
    return {
        "weights": parameters * size * (share if stage == 3 else 1),
        "gradients": parameters * size * (share if stage >= 2 else 1),
        "master weights": parameters * 4 * (share if stage else 1) if half or stage else 0,
        "optimizer moments": parameters * 4 * moments * (share if stage else 1),
    }
