"""What a model learns: the module that turns a micro-batch into sums which add up over micro-batches and ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from trainer.errors import TesseraError
from trainer.tasks.cross_entropy import VocabularyCrossEntropy

_AUXILIARY_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_alpha", "aux_loss_coef", "ffn_config.moe_loss_weight")
"""What configurations call the weight of their load-balancing loss; the last is dbrx's."""


def auxiliary_coefficient(config: PreTrainedConfig) -> float:
    """The weight of the load-balancing loss that the family's own loss gives it.

    Raises:
        TesseraError: if the configuration has none.
    """
    text = config.get_text_config(decoder=True)
    for path in _AUXILIARY_COEFFICIENTS:
        value: Any = text
        for key in path.split("."):
            value = getattr(value, key, None)
        if value is not None:
            return float(value)
    raise TesseraError(f"{text.model_type} returns a load-balancing loss, and its configuration no coefficient")


class TaskLoss(NamedTuple):
    """What one micro-batch contributes."""

    loss_sum: Tensor
    """Cross entropy summed over the predicted tokens: what is reported. fp32 scalar without a gradient."""

    objective: Tensor
    """What is minimised, summed over the predicted tokens: the cross entropy, smoothed and with z-loss where asked
    for. fp32 scalar."""

    auxiliary: Tensor
    """The family's own extra loss on this micro-batch (a mixture's load balancing), already weighted by its
    coefficient; 0 where there is none. fp32 scalar."""

    token_losses_BT: Tensor
    """The cross entropy of each label, 0 where it is ignored. fp32, without a gradient."""


class CausalLanguageModeling(nn.Module):
    """Predicts each next token. The labels come shifted, so position t of the logits belongs to label t."""

    def __init__(self, model: PreTrainedModel, cross_entropy: VocabularyCrossEntropy) -> None:
        super().__init__()
        self.model = model
        self._cross_entropy = cross_entropy

    def forward(self, input_ids_BT: Tensor, labels_BT: Tensor, attention_mask_BT: Tensor | None = None) -> TaskLoss:
        output = self.model(input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False)
        sums = self._cross_entropy(output.logits, labels_BT)
        auxiliary = self._auxiliary(output, sums.cross_entropy)
        return TaskLoss(sums.cross_entropy, sums.objective, auxiliary, sums.per_token)

    def _auxiliary(self, output: object, like: Tensor) -> Tensor:
        auxiliary = getattr(output, "aux_loss", None)
        if not isinstance(auxiliary, Tensor):
            return torch.zeros_like(like)
        return auxiliary.float() * auxiliary_coefficient(self.model.config)


TASKS = {"causal_lm": CausalLanguageModeling}
"""Task by its name in `model.task`."""
