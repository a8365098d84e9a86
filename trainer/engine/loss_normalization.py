"""The factor from the summed loss of a micro-batch to the objective whose gradient is accumulated."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trainer.data.batches import StepBatch
from trainer.tasks import TaskLoss
from trainer.topology import GRADIENT_AXES, Topology


@dataclass(frozen=True)
class LossNormalization:
    """Normalizes the losses of a micro-batch, so that the reduced gradient is that of the loss per token.

    DeepSpeed averages gradients over the D ranks of `GRADIENT_AXES`. The gradient of the mean over all N tokens
    of the global batch is therefore the sum over micro-batches of the gradient of loss_sum * D / N, however unevenly
    the tokens are spread over micro-batches and ranks. Auxiliary losses are averaged over micro-batches.
    """

    token_weight: float
    auxiliary_divisor: int

    @classmethod
    def for_step(cls, batch: StepBatch, topology: Topology, *, engine_divides: bool) -> LossNormalization:
        """Compute the factors for every micro-batch of a step.

        Args:
            batch: this rank's micro-batches of the global batch.
            topology: of this rank.
            engine_divides: whether the engine divides each objective by the number of micro-batches, as DeepSpeed's
                pipeline engine does.
        """
        count, gradient_ranks = len(batch.micro_batches), topology.size(*GRADIENT_AXES)
        if engine_divides:
            return cls(count * gradient_ranks / batch.tokens, 1)
        return cls(gradient_ranks / batch.tokens, count)

    def objective(self, loss: TaskLoss) -> Tensor:
        """Compute the scalar whose gradient a micro-batch contributes."""
        return loss.objective * self.token_weight + loss.auxiliary / self.auxiliary_divisor
