"""The engine without a pipeline: data and tensor parallelism with ZeRO 0 to 3, over DeepSpeed's engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from trainer.compat.deepspeed.zero3 import gathered
from trainer.data.batches import StepBatch
from trainer.engine.base import BaseEngine
from trainer.engine.interface import Evaluation, StepResult
from trainer.engine.loss_accumulator import LossAccumulator
from trainer.engine.loss_normalization import LossNormalization
from trainer.sharding import shard_of
from trainer.tasks import MicroBatch, TaskLoss

_MODEL_PREFIX = "model."
"""Prefix of parameter names in a task module, before the Hugging Face name."""


class PlainEngine(BaseEngine):
    """Every rank holds the model's tensor shard, under ZeRO 3 partitioned over the data ranks."""

    @property
    def models(self) -> list[nn.Module]:
        """See `Engine.models`."""
        model = self.deepspeed_engine.module.model
        assert isinstance(model, nn.Module)
        return [model]

    def _forward(self, micro_batch: MicroBatch) -> TaskLoss:
        on_device = micro_batch.to(self._world.device)
        loss: TaskLoss = self.deepspeed_engine(on_device.labels, **on_device.inputs)
        return loss

    def train_step(
        self,
        batch: StepBatch,
        *,
        verify_step: int | None = None,
        before_update: Callable[[], None] | None = None,
    ) -> StepResult:
        """See `Engine.train_step`. Collective: all ranks must call it."""
        learning_rate = self._learning_rate()
        normalization = LossNormalization.for_step(batch, self._world.topology, engine_divides=False)
        loss_sum = auxiliary_sum = torch.zeros((), device=self._world.device)
        grad_norm: Tensor | None = None
        if self._is_first_step:
            self._check_same_samples(batch.micro_batches[0])
        last = len(batch.micro_batches) - 1
        for index, micro_batch in enumerate(batch.micro_batches):
            self._world.phases.advance()
            loss = self._forward(micro_batch)
            self.deepspeed_engine.backward(normalization.objective(loss), scale_wrt_gas=False)
            if self._is_first_step:
                self._mapper.verify_gradients()
                self._is_first_step = False
            loss_sum = loss_sum + loss.loss_sum.detach()
            auxiliary_sum = auxiliary_sum + loss.auxiliary.detach()
            if index == last:
                grad_norm = self._finish_gradients(verify_step, before_update)
            self.deepspeed_engine.step()  # updates at the last micro-batch only
        if verify_step is not None:
            self.replica_verifier.verify(verify_step)
        return self._step_result(
            (loss_sum, auxiliary_sum), grad_norm=grad_norm, learning_rate=learning_rate, micro_batches=last + 1
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> Evaluation:
        """See `Engine.evaluate`. Collective: all ranks must call it."""
        self.deepspeed_engine.eval()
        sums = LossAccumulator(self._task, self._world.device)
        for micro_batch in batches:
            self._world.phases.advance()
            sums.targets += micro_batch.num_targets
            loss = self._forward(micro_batch)
            sums.add(loss.loss_sum, loss.extra)
        self.deepspeed_engine.train()
        return self._reduce_evaluation(sums)

    @torch.no_grad()
    def target_losses(self, micro_batch: MicroBatch) -> Tensor:
        """See `Engine.target_losses`. Collective: all ranks must call it.

        Returns:
            fp32 in the shape of the labels, 0 where a label is ignored.
        """
        self.deepspeed_engine.eval()
        losses = self._forward(micro_batch).target_losses
        self.deepspeed_engine.train()
        return losses

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.full_weights`. Collective: all ranks must iterate to the end."""
        for name, parameter in self.deepspeed_engine.module.named_parameters():
            with gathered(parameter):
                yield from self._joiner.add(name.removeprefix(_MODEL_PREFIX), parameter.detach(), shard_of(parameter))
        yield from self._persistent_buffers()
