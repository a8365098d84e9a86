"""The engine over `deepspeed.initialize`: data and tensor parallelism with ZeRO 0 to 3."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from torch import Tensor, nn

from trainer.data.batches import StepBatch
from trainer.engine.base import BaseEngine, EvaluationSums
from trainer.engine.interface import Evaluation, StepResult
from trainer.sharding import shard_of
from trainer.tasks import MicroBatch, TaskLoss

_MODEL_PREFIX = "model."
"""Of parameter names in a task module, before the Hugging Face name."""


class PlainEngine(BaseEngine):
    """Every rank holds the whole model, or its tensor rank's part of it, or under ZeRO-3 a data rank's part of that."""

    @property
    def models(self) -> list[nn.Module]:
        """The Hugging Face model."""
        return [self._engine.module.model]

    def _forward(self, micro: MicroBatch) -> TaskLoss:
        on_device = micro.to(self._world.device)
        loss: TaskLoss = self._engine(on_device.labels, **on_device.inputs)
        return loss

    def train_step(self, batch: StepBatch, *, verify_step: int | None = None) -> StepResult:
        """See `Engine.train_step`."""
        learning_rate = self._learning_rate()
        weight = self._world.topology.data / batch.tokens
        count = len(batch.micro_batches)
        loss_sum = auxiliary_sum = torch.zeros((), device=self._world.device)
        grad_norm: Tensor | None = None
        if self._first_backward_pending:
            self._check_same_samples(batch.micro_batches[0])
        for number, micro in enumerate(batch.micro_batches, start=1):
            self._world.phases.advance()
            loss = self._forward(micro)
            objective = loss.objective * weight + loss.auxiliary / count
            self._engine.backward(objective, scale_wrt_gas=False)
            if self._first_backward_pending:
                self._mapper.verify_gradients()
                self._first_backward_pending = False
            loss_sum = loss_sum + loss.loss_sum.detach()
            auxiliary_sum = auxiliary_sum + loss.auxiliary.detach()
            if number == count and self._max_grad_norm is not None:
                grad_norm = self._clip_gradients(self._max_grad_norm)
            if number == count and verify_step is not None:
                self._replica_verifier.verify_before_update(verify_step)
            self._engine.step()
        if verify_step is not None:
            self._replica_verifier.verify(verify_step)
        return self._step_result((loss_sum, auxiliary_sum), grad_norm, learning_rate, count)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> Evaluation:
        """See `Engine.evaluate`."""
        self._engine.eval()
        sums = EvaluationSums(self._task, self._world.device)
        for micro in batches:
            self._world.phases.advance()
            sums.targets += micro.num_targets
            loss = self._forward(micro)
            sums.add(loss.loss_sum, loss.extra)
        self._engine.train()
        return self._reduce_evaluation(sums)

    @torch.no_grad()
    def target_losses(self, micro_batch: MicroBatch) -> Tensor:
        """See `Engine.target_losses`."""
        self._engine.eval()
        losses = self._forward(micro_batch).target_losses
        self._engine.train()
        return losses

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.full_weights`."""
        for name, parameter in self._engine.module.named_parameters():
            with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                yield from self._joiner.add(name.removeprefix(_MODEL_PREFIX), parameter.detach(), shard_of(parameter))
        yield from self._persistent_buffers()
