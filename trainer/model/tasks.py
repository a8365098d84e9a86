"""What a model learns: the module that turns a micro-batch into sums which add up over micro-batches and ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from trainer.errors import TesseraError


class TaskLoss(NamedTuple):
    """What one micro-batch contributes."""

    loss_sum: Tensor
    """Cross entropy summed over the predicted tokens, fp32 scalar."""

    auxiliary: Tensor
    """The family's own extra loss on this micro-batch (a mixture's load balancing), already weighted by its
    coefficient; 0 where there is none. fp32 scalar."""


class CausalLanguageModeling(nn.Module):
    """Predicts each next token. The labels come shifted, so position t of the logits belongs to label t."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids_BT: Tensor, labels_BT: Tensor, attention_mask_BT: Tensor | None = None) -> TaskLoss:
        output = self.model(input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False)
        logits_NV = output.logits.flatten(0, 1).float()
        loss_sum = F.cross_entropy(logits_NV, labels_BT.flatten(), ignore_index=-100, reduction="sum")
        return TaskLoss(loss_sum, self._auxiliary(output, loss_sum))

    def _auxiliary(self, output: object, like: Tensor) -> Tensor:
        auxiliary = getattr(output, "aux_loss", None)
        if not isinstance(auxiliary, Tensor):
            return torch.zeros_like(like)
        config = self.model.config.get_text_config(decoder=True)
        for name in ("router_aux_loss_coef", "aux_loss_alpha", "aux_loss_coef"):
            if hasattr(config, name):
                return auxiliary.float() * float(getattr(config, name))
        raise TesseraError(f"{config.model_type} returns a load-balancing loss, and its configuration no coefficient")


TASKS = {"causal_lm": CausalLanguageModeling}
"""Task by its name in `model.task`."""
