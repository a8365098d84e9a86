"""Sums of losses over micro-batches, in training and evaluation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.tasks import Task


class LossAccumulator:
    """Losses, further sums of the task, and targets of the micro-batches that this rank has computed."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.extra = {name: torch.zeros((), dtype=torch.float64, device=device) for name in task.extra_sums}
        self.targets = 0

    def add(self, loss: Tensor, extra: Mapping[str, Tensor]) -> None:
        """Add the sums of some micro-batches (scalars)."""
        self.loss = self.loss + loss
        for name in self.extra:
            self.extra[name] = self.extra[name] + extra[name]
