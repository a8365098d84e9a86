"""What the loop asks of an engine, whatever runs below it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from trainer.data.batches import StepBatch
from trainer.engine.state import TrainingState
from trainer.tasks import MicroBatch


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step left on this rank. Tensors stay on the device until somebody logs them."""

    loss_sum: Tensor
    """This rank's part of the summed cross entropy, fp32 scalar."""

    auxiliary_sum: Tensor
    """This rank's auxiliary losses, summed over its micro-batches, fp32 scalar."""

    grad_norm: Tensor | float | None
    """Norm of the whole gradient before clipping; None where DeepSpeed was told not to compute it."""

    learning_rate: float
    """The rate that this step used."""

    micro_batches: int
    applied: bool
    """False where DeepSpeed skipped the update because a gradient was not finite."""

    idle_share: Callable[[], float] | None = None
    """Asks what share of the step this rank has waited for other stages; None without a pipeline."""


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss over all ranks."""

    loss: float
    tokens: int
    metrics: Mapping[str, float]
    """The task's metrics."""


class Engine(Protocol):
    """Trains, evaluates, and gives its weights and its state away."""

    @property
    def state(self) -> TrainingState:
        """All that a checkpoint holds of it, to read and to write."""

    def train_step(self, batch: StepBatch, *, verify_step: int | None = None) -> StepResult:
        """One optimizer step on the global batch that `batch` is this rank's part of.

        Args:
            verify_step: the step's number, if the weights that several ranks hold are to be compared in it. See
                `Replicas`.

        Raises:
            ReplicasDifferError: on all ranks, naming those whose copy is wrong.
        """

    def evaluate(self, batches: Iterable[MicroBatch]) -> Evaluation:
        """The token-weighted loss over all ranks' micro-batches; all ranks must pass equally many."""

    def target_losses(self, micro_batch: MicroBatch) -> Tensor | None:
        """Compute the loss of each label of one micro-batch as in evaluation. Collective: all ranks must call it.

        Returns:
            fp32 in the shape of the labels, 0 where a label is ignored; None on stages that do not compute the loss.
        """

    def all_gather_scalars(self, values: list[Tensor | float]) -> list[list[float]]:
        """Every rank's `values`, by rank: the one exchange of a step that logs."""

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and persistent buffer by its Hugging Face name, whole, one at a time, in the model's order.

        All ranks must walk through it; a tensor is only there until the next one is asked for.
        """
