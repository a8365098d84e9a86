"""The task interface: the requirements of training, evaluation and export, and those of a task on a model."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from trainer.config.schema import DataSection
from trainer.tasks.cross_entropy import LossSums, VocabularyCrossEntropy
from trainer.tasks.micro_batch import MicroBatch

Ids = npt.NDArray[np.int64]
"""(T,): the token ids of one sample."""

StoredIds = npt.NDArray[Any]
"""(T,): token ids in the integer type of their file."""


class TokenDocuments(Protocol):
    """Documents of a token file."""

    bin_path: Path

    @property
    def lengths(self) -> npt.NDArray[np.signedinteger[Any]]:
        """(documents,): tokens of each."""

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""

    def stream(self, start: int, length: int) -> StoredIds:
        """Return at most `length` ids from token `start` of the concatenated documents."""

    def document(self, number: int, limit: int | None = None) -> StoredIds:
        """Return at most the first `limit` ids of a document."""


class Samples(Protocol):
    """Samples of a token file, by number."""

    def __len__(self) -> int: ...

    @property
    def num_truncated(self) -> int:
        """Documents whose ids are not all read."""

    def ids(self, number: int) -> StoredIds:
        """Return the ids of a sample, inputs and labels together."""

    def count_targets(self, numbers: npt.NDArray[np.int64]) -> int:
        """Count the predictions in these samples, without reading them."""


class Needs(enum.Enum):
    """Outputs of a forward pass that a task's loss reads."""

    LOGITS = "logits"
    """The model's output."""

    HIDDEN_AND_HEAD = "hidden states and output embeddings"
    """The input of the output embeddings, and a function from it to logits. A loss may apply it in chunks of tokens, so
    that the logits of a micro-batch never exist at once."""


@dataclass(frozen=True)
class Collation:
    """Padding of the samples of a micro-batch."""

    length: int
    """Maximum number of inputs of a sample."""

    pad_id: int
    pad_to_multiple_of: int
    """Of the padded width, unless it is `length`."""

    mask_padding: bool
    """Whether padding is masked out even if the task does not require it. Under a causal mask no token attends to the
    padding after it; a load-balancing loss, which counts all tokens, still needs the mask."""


@dataclass(frozen=True)
class Prediction:
    """The output of one forward pass, in the form that the task needs."""

    output: ModelOutput
    """The model's output. Its logits are empty where the head is applied by the loss."""

    hidden: Tensor
    """(B, T, D): the input of `head`. The logits themselves where the family changes what its head returns."""

    head: Callable[[Tensor], Tensor]
    """(..., D) -> (..., v): the columns of the logits that this tensor rank holds."""


class TaskLoss(NamedTuple):
    """The contribution of one micro-batch: the fields of `LossSums`, and the family's auxiliary loss."""

    loss_sum: Tensor
    objective: Tensor
    target_losses: Tensor
    extra: Mapping[str, Tensor]
    auxiliary: Tensor
    """The family's own additional loss (load balancing of a mixture), weighted by its coefficient; 0 where there is
    none. fp32 scalar."""


class Task(Protocol):
    """A training task. Implementations are stateless. Facts that the configuration needs are in `TASK_FAMILIES`."""

    name: str
    """Value of `model.task`."""

    auto_class: type[Any]
    """One of transformers' auto classes: builds a model from its configuration or from files."""

    needs: Needs
    forward_options: Mapping[str, object]
    """Constant keyword arguments of the forward pass."""

    extra_sums: tuple[str, ...]
    """Names of the sums, in addition to the loss, that `loss` returns and `metrics` reads."""

    def open_samples(self, tokens: TokenDocuments, data: DataSection) -> Samples:
        """Return the samples of a token file.

        Raises:
            DataError: if there is not one.
        """

    def collate(self, rows: Sequence[Ids], collation: Collation) -> MicroBatch:
        """Collate the ids of samples into one micro-batch."""

    def example_inputs(self, model: PreTrainedModel, batch: int, length: int) -> dict[str, Tensor]:
        """Return inputs on the meta device for a forward pass without values.

        Shapes are (batch, length), followed by dimensions of the model.
        """

    def loss(self, prediction: Prediction, labels: Tensor, cross_entropy: VocabularyCrossEntropy) -> LossSums:
        """Return the loss of a micro-batch, summed over its targets.

        Args:
            prediction: of the forward pass.
            labels: (B, ...), as `collate` returns them.
            cross_entropy: of logits, of which this tensor rank may hold only some columns.
        """

    def metrics(self, loss: float, extra: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics of an evaluation.

        Args:
            loss: mean over all targets.
            extra: sums over all targets divided by their number, by the names in `extra_sums`.
        """
