"""What a model costs: parameters, FLOPs a token, bytes of model states. Arithmetic on a model on the meta device."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn
from transformers import PreTrainedModel

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
"""Dense half-precision matrix FLOP/s of a device, from its maker's data sheet (sparsity not counted)."""


def peak_flops(device_name: str) -> float | None:
    """The peak of the device that calls itself `device_name`; None where it is unknown."""
    words = set(re.split(r"[\s/-]+", device_name))
    known = [name for name in PEAK_FLOPS if words.issuperset(name.split())]
    return PEAK_FLOPS[max(known, key=len)] if known else None


@dataclass(frozen=True)
class ModelCost:
    """Whole-model numbers, whatever the layout."""

    parameters: int
    """Distinct parameters; tied ones once."""

    active_matrix_parameters: int
    """Parameters that each token is multiplied with: no embedding look-ups, of the experts those routed to."""

    attention_flops_per_position: int
    """FLOPs, forward and backward, that each key adds for each query, over all layers: 12 x layers x width."""

    def flops_per_token(self, length: int) -> float:
        """FLOPs of forward and backward for one token in a sequence of `length`.

        6 x parameters + 12 x layers x width x length, as in PaLM (Chowdhery et al. 2022, appendix B): attention
        is counted in full, not halved for causality; recomputation is not counted.
        """
        return 6.0 * self.active_matrix_parameters + float(self.attention_flops_per_position) * length


def _active_share(config: Any) -> float:
    """Of a mixture's experts, the part that one token is routed to; 1 without a mixture."""
    counts = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    chosen = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
    experts = next((int(getattr(config, n)) for n in counts if isinstance(getattr(config, n, None), int)), 0)
    picked = next((int(getattr(config, n)) for n in chosen if isinstance(getattr(config, n, None), int)), 0)
    return min(1.0, picked / experts) if experts and picked else 1.0


def model_cost(model: PreTrainedModel) -> ModelCost:
    """Counts a model; its tensors may be on the meta device."""
    config = model.config.get_text_config(decoder=True)
    share = _active_share(config)
    head = getattr(model.get_output_embeddings(), "weight", None)
    active = 0.0 if head is None else float(prod(head.shape))
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, nn.Embedding) or parameter is head:
                continue
            if parameter.dim() in (2, 3):  # three dimensions: the experts of a mixture
                active += prod(parameter.shape) * (share if parameter.dim() == 3 else 1.0)
    width = int(getattr(config, "num_attention_heads", 0) or 0) * _head_size(config)
    layers = int(getattr(config, "num_hidden_layers", 0) or 0)
    return ModelCost(
        parameters=sum(prod(p.shape) for p in model.parameters()),
        active_matrix_parameters=round(active),
        attention_flops_per_position=12 * layers * width,
    )


def _head_size(config: Any) -> int:
    size = getattr(config, "head_dim", None)
    heads = getattr(config, "num_attention_heads", None)
    return int(size) if isinstance(size, int) else int(config.hidden_size) // int(heads) if heads else 0


def state_bytes(parameters: int, *, stage: int, data_ranks: int, half: bool, moments: int = 2) -> dict[str, float]:
    """Bytes of model states on one rank under ZeRO (Rajbhandari et al. 2020, table 1, as DeepSpeed lays them out).

    Args:
        parameters: those of this rank's part of the model. stage: ZeRO stage. half: bf16 or fp16 weights
        beside an fp32 master copy. moments: fp32 tensors of the optimizer per parameter (AdamW 2).

    Returns:
        weights, gradients, master weights and optimizer moments, in bytes.
    """
    size = 2 if half else 4
    share = 1 / data_ranks
    return {
        "weights": parameters * size * (share if stage == 3 else 1),
        "gradients": parameters * size * (share if stage >= 2 else 1),
        "master weights": parameters * 4 * (share if stage else 1) if half or stage else 0,
        "optimizer moments": parameters * 4 * moments * (share if stage else 1),
    }
