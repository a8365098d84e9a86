"""Llama's attention, and an MLP whose weights no plan of transformers names."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


class WizardConfig(LlamaConfig):
    model_type = "wizard"
    base_model_tp_plan = {f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"} | {
        "layers.*.self_attn.o_proj": "rowwise"
    }


class Wand(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.raise_it = nn.Linear(config.hidden_size, config.intermediate_size)
        self.lower_it = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        lowered: Tensor = self.lower_it(F.relu(self.raise_it(hidden_BTD)).square())
        return lowered


class WizardLayer(LlamaDecoderLayer):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.mlp = Wand(config)


class WizardModel(LlamaModel):
    config_class = WizardConfig
    _no_split_modules = ["WizardLayer"]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(WizardLayer(config, n) for n in range(config.num_hidden_layers))
        self.post_init()


class WizardForCausalLM(LlamaForCausalLM):
    config_class = WizardConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = WizardModel(config)
        self.post_init()
