"""The model together with its loss: the module that an engine trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from trainer.errors import TesseraError
from trainer.tasks.cross_entropy import VocabularyCrossEntropy
from trainer.tasks.interface import Needs, Prediction, Task, TaskLoss

_AUXILIARY_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_alpha", "aux_loss_coef", "ffn_config.moe_loss_weight")
"""Configuration keys of the coefficient of a load-balancing loss; the last is dbrx's."""


def auxiliary_coefficient(config: PreTrainedConfig) -> float:
    """Return the coefficient that the family's own loss gives its load-balancing loss.

    Raises:
        TesseraError: if the configuration has none.
    """
    text = config.get_text_config(decoder=True)
    for path in _AUXILIARY_COEFFICIENTS:
        value: object = text
        for key in path.split("."):
            value = getattr(value, key, None)
        if isinstance(value, int | float):
            return float(value)
    raise TesseraError(f"{text.model_type} returns a load-balancing loss, and its configuration has no coefficient")


class DeferredHead:
    """Output embeddings that the loss applies, in place of the model's forward pass.

    Within `deferred` the module returns empty logits and keeps its input. Hooks around the module's own computation
    (those of tensor parallelism, which enter the region and gather the sequence) have run by then, so that
    calling the head on chunks of the input adds no communication to the forward pass.
    """

    def __init__(self, module: nn.Linear) -> None:
        self._compute: Callable[[Tensor], Tensor] = module.forward
        self._width = module.weight.shape[0]
        self._is_deferred = False
        self._hidden: Tensor | None = None
        module.forward = self._forward  # type: ignore[assignment, method-assign]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., D) to this tensor rank's columns of the logits (..., v)."""
        return self._compute(hidden)

    def _forward(self, hidden: Tensor) -> Tensor:
        if not self._is_deferred:
            return self._compute(hidden)
        self._hidden = hidden
        return hidden.new_empty((*hidden.shape[:-2], 0, self._width))

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Defer the module's computation."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def take_hidden(self) -> Tensor:
        """Return the input (B, T, D) of the last deferred call."""
        hidden, self._hidden = self._hidden, None
        assert hidden is not None, "the model did not call its output embeddings"
        return hidden


class TaskModule(nn.Module):
    """Turns the inputs and labels of a micro-batch into a `TaskLoss`."""

    def __init__(
        self, model: PreTrainedModel, task: Task, cross_entropy: VocabularyCrossEntropy, *, can_defer_head: bool = False
    ) -> None:
        """Wrap a model whose parameters and modules are final.

        Args:
            model: on this rank.
            task: whose loss is computed.
            cross_entropy: of the logits of this tensor rank.
            can_defer_head: whether the logits of the model are what its output embeddings return
                (`returns_head_output`), and their weight can be read at any time.
        """
        super().__init__()
        self.model = model
        self.task, self._cross_entropy = task, cross_entropy
        head = model.get_output_embeddings() if can_defer_head and task.needs is Needs.HIDDEN_AND_HEAD else None
        self._head = DeferredHead(head) if isinstance(head, nn.Linear) else None

    def forward(self, labels: Tensor, **inputs: Tensor) -> TaskLoss:
        """Run the model and the task's loss.

        Args:
            labels: (B, ...).
            inputs: as `MicroBatch.inputs`.
        """
        prediction = self._predict(inputs)
        sums = self.task.loss(prediction, labels, self._cross_entropy)
        return TaskLoss(**sums._asdict(), auxiliary=self._auxiliary(prediction.output, sums.loss_sum))

    def _predict(self, inputs: dict[str, Tensor]) -> Prediction:
        if self._head is None:
            output = self.model(**inputs, **self.task.forward_options)
            return Prediction(output, output.logits, lambda logits: logits)
        with self._head.deferred():
            output = self.model(**inputs, **self.task.forward_options)
        return Prediction(output, self._head.take_hidden(), self._head)

    def _auxiliary(self, output: ModelOutput, like: Tensor) -> Tensor:
        auxiliary = getattr(output, "aux_loss", None)
        if not isinstance(auxiliary, Tensor):
            return torch.zeros_like(like)
        return auxiliary.float() * auxiliary_coefficient(self.model.config)
