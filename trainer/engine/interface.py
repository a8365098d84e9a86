"""The interface of an engine to the training loop, to checkpoints and to update modes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from trainer.checkpoint_format import TensorChunk
from trainer.compat.deepspeed.counters import COUNTERS
from trainer.data.batches import StepBatch
from trainer.tasks import MicroBatch


@dataclass(frozen=True)
class StepResult:
    """Outcome of one optimizer step on this rank. Tensors stay on the device until they are logged."""

    loss_sum: Tensor
    """This rank's contribution to the summed cross entropy, fp32 scalar."""

    auxiliary_sum: Tensor
    """This rank's auxiliary losses, summed over its micro-batches, fp32 scalar."""

    grad_norm: Tensor | float | None
    """Norm of the full gradient before clipping; None where DeepSpeed is configured not to compute it."""

    learning_rate: float
    """Unscaled learning rate of this step."""

    micro_batches: int
    """Micro-batches whose losses this rank reports; 0 if another rank reports them."""

    applied: bool
    """False if DeepSpeed skipped the update because a gradient was not finite."""

    idle_share: Callable[[], float] | None = None
    """Returns the share of the step in which this rank waited for other stages; None without a pipeline."""


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss over all ranks."""

    loss: float
    """Mean cross entropy over all targets."""

    tokens: int
    """Targets."""

    metrics: Mapping[str, float]
    """Metrics of the task."""


Scalars = dict[str, float]
"""Non-tensor state of one parameter, such as `step`."""


@dataclass(frozen=True)
class ScalarState:
    """Non-tensor training state, JSON-serializable."""

    counters: Mapping[str, int]
    """Counters by the names in `COUNTERS`."""

    scaler: Mapping[str, float | bool]
    """State of the dynamic loss scale of fp16; empty in other precisions."""

    scalars: Mapping[str, Scalars]
    """Non-tensor optimizer state by parameter; under "" the state that most parameters have."""

    @classmethod
    def initial(cls) -> ScalarState:
        """State before the first step."""
        return cls(dict.fromkeys(COUNTERS, 0), {}, {})


class TrainingState(Protocol):
    """Master weights, optimizer state and counters of an engine, to be used between two steps.

    Checkpoints save `owned_chunks` and `scalar_state`, and load by writing into `local_chunks`. Update modes change
    the fp32 weights among `local_chunks` and call `sync_model_weights`.
    """

    def owned_chunks(self) -> Iterator[TensorChunk]:
        """Chunks that this rank saves: over all ranks, every element of every tensor exactly once."""

    def local_chunks(self) -> Iterator[TensorChunk]:
        """All chunks that this rank holds, whether or not other ranks hold them too.

        Weights are fp32 masters. Optimizer state is complete after `allocate_optimizer_state`.
        """

    def scalar_state(self) -> ScalarState:
        """Non-tensor state of this rank; `scalars` has the parameters that this rank holds."""

    def allocate_optimizer_state(self) -> None:
        """Create optimizer state that does not exist yet, with values that are to be overwritten."""

    def drop_optimizer_state(self, names: Collection[str]) -> None:
        """Drop the optimizer state of parameters that were never stepped, where each parameter has its own."""

    def load_scalar_state(self, scalar_state: ScalarState) -> None:
        """Restore the non-tensor state and sync the model weights, once all tensors are written.

        Collective: all ranks must call it.
        """

    def sync_model_weights(self) -> None:
        """Copy the fp32 master weights into the weights that the model computes with.

        Collective: all ranks must call it.
        """


class Engine(Protocol):
    """Runs optimizer steps and evaluation; exposes weights and training state."""

    @property
    def state(self) -> TrainingState:
        """Training state, to read and to write."""

    @property
    def models(self) -> list[nn.Module]:
        """The Hugging Face model of each of this rank's stages."""

    def train_step(
        self,
        batch: StepBatch,
        *,
        verify_step: int | None = None,
        before_update: Callable[[], None] | None = None,
    ) -> StepResult:
        """Run one optimizer step. Collective: all ranks must call it.

        Args:
            batch: this rank's micro-batches of the global batch.
            verify_step: number of the step, to compare replicated weights between ranks in it; see `ReplicaVerifier`.
            before_update: called when the gradients are complete and reduced, before clipping and the update.

        Raises:
            ReplicasDifferError: on all ranks, naming those whose replicas are wrong.
        """

    def evaluate(self, batches: Iterable[MicroBatch]) -> Evaluation:
        """Compute the token-weighted loss over all ranks' micro-batches. Collective: all ranks must call it.

        All ranks must pass the same number of micro-batches.
        """

    def target_losses(self, micro_batch: MicroBatch) -> Tensor | None:
        """Compute the loss of each label of one micro-batch as in evaluation. Collective: all ranks must call it.

        Returns:
            Losses in fp32, in the shape of the labels, 0 for ignored labels; None on stages that do not compute the
            loss.
        """

    def all_gather_scalars(self, values: list[Tensor | float]) -> list[list[float]]:
        """Gather every rank's `values`, in rank order. Collective: all ranks must call it.

        The only communication that logging a step adds.
        """

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter and persistent buffer in full, by Hugging Face name, in the model's order.

        Collective: all ranks must iterate to the end. A tensor is valid until the next one is requested.
        """
