"""A pipeline stage as the module that DeepSpeed's pipeline engine calls."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trainer.engine.loss_accumulator import LossAccumulator
from trainer.engine.loss_normalization import LossNormalization
from trainer.pipeline import BoundaryTensors, Stage
from trainer.tasks import MicroBatch, TaskLoss, TaskModule
from trainer.tensor_parallel import Mapper


class StageModule(nn.Module):
    """Maps received activations to sent activations, or to the objective on the last stage.

    DeepSpeed calls it once per micro-batch. The stage takes the micro-batches from its own queue rather than from the
    previous stage: batches are a function of the step, so every stage can read them, and only activations cross a
    boundary.
    """

    def __init__(self, task_module: TaskModule, stage: Stage, mapper: Mapper, device: torch.device) -> None:
        """Wrap a stage.

        Args:
            task_module: task module around the Hugging Face model of the stage.
            stage: stage that is installed in the model.
            mapper: mapper of the model.
            device: device that computes.
        """
        super().__init__()
        self.task_module, self.mapper = task_module, mapper
        self._stage, self._device = stage, device
        self._micro_batches: deque[MicroBatch] = deque()
        self._normalization: LossNormalization | None = None
        self._is_first_step = True
        self.sums = LossAccumulator(task_module.task, device)
        self.auxiliary_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.first_target_losses: Tensor | None = None
        """fp32 losses of the schedule's first micro-batch in the labels' shape, on the stage that computes the loss."""

    @property
    def model(self) -> nn.Module:
        """The Hugging Face model, of which the layers of this stage compute."""
        return self.task_module.model

    def load_micro_batches(
        self, micro_batches: Iterable[MicroBatch], normalization: LossNormalization | None = None
    ) -> None:
        """Queue the micro-batches of the next schedule, and reset the sums of losses.

        Args:
            micro_batches: micro-batches in the order of the schedule.
            normalization: normalization of the losses; None in evaluation.
        """
        assert not self._micro_batches, "a schedule has not consumed all of its micro-batches"
        self._micro_batches.extend(micro_batches)
        self._normalization = normalization
        self.sums = LossAccumulator(self.task_module.task, self._device)
        self.auxiliary_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        self.first_target_losses = None

    def forward(self, received: BoundaryTensors | Tensor) -> BoundaryTensors | Tensor:
        """Compute this stage's layers on the next micro-batch.

        Args:
            received: boundary tensors from the previous stage; () on the first stage.

        Returns:
            Boundary tensors for the next stage (a single one not in a tuple), or the scalar objective.
        """
        micro_batch = self._micro_batches.popleft().to(self._device)

        def compute() -> TaskLoss:
            loss: TaskLoss = self.task_module(micro_batch.labels, **micro_batch.inputs)
            return loss

        result = self._stage.run(compute, received if isinstance(received, tuple) else (received,))
        if not isinstance(result, TaskLoss):
            self.mapper.end_forward(self._device)
            return result[0] if len(result) == 1 else result
        self.sums.add(result.loss_sum.detach(), result.extra)
        self.auxiliary_sum = self.auxiliary_sum + result.auxiliary.detach()
        if self.first_target_losses is None:
            self.first_target_losses = result.target_losses
        return result.loss_sum if self._normalization is None else self._normalization.objective(result)

    def verify_gradients(self) -> None:
        """Check gradients after the first backward pass; see `Mapper.verify_gradients`.

        Collective in the first step: all tensor ranks must call it.
        """
        if self._is_first_step:
            self.mapper.verify_gradients()
            self._is_first_step = False
