"""The engine with a pipeline: data and tensor parallelism with ZeRO 0 or 1, over DeepSpeed's pipeline engine.

DeepSpeed runs the schedule, sends, receives, reduces and updates. `trainer/compat/deepspeed/pipeline.py` shows the
schedule and the instructions that are replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.compat.deepspeed.interfaces import DeepSpeedPipelineEngine
from trainer.compat.deepspeed.pipeline import (
    ScheduleHooks,
    evaluating,
    gradient_to_reduce,
    is_dualpipev,
    replace_instructions,
    run_evaluation_schedule,
    run_training_schedule,
)
from trainer.data.batches import StepBatch
from trainer.distributed import World
from trainer.engine.base import BaseEngine
from trainer.engine.interface import Evaluation, StepResult
from trainer.engine.loss_accumulator import LossAccumulator
from trainer.engine.loss_normalization import LossNormalization
from trainer.engine.pipeline_clock import PipelineClock
from trainer.engine.stage_module import StageModule
from trainer.pipeline import local_parameters, shared_parameters
from trainer.sharding import local_and_remote_parameters, shard_of
from trainer.tasks import MicroBatch, pad_to_common_shape

EVALUATION_MICRO_BATCHES_PER_STAGE = 4
"""Micro-batches per stage that are evaluated in one schedule.

With S stages under 1F1B, 4 S micro-batches take 5 S - 1 forward passes, of which a rank is idle in S - 1: less than a
fifth."""


class PipelineEngine(BaseEngine):
    """Every rank holds one stage, or two under DualPipeV, each with its tensor shard."""

    def __init__(
        self,
        deepspeed_engine: DeepSpeedPipelineEngine,
        world: World,
        stages: list[StageModule],
        *,
        max_grad_norm: float | None,
        parameter_ranks: dict[str, tuple[int, ...]],
    ) -> None:
        """Wrap an engine of DeepSpeed and replace instructions of its schedule.

        Collective: all ranks must call it.

        Args:
            deepspeed_engine: from `deepspeed.initialize`.
            world: of this rank.
            stages: of this rank.
            max_grad_norm: see `BaseEngine`.
            parameter_ranks: pipeline ranks that hold each weight, ascending; the keys are its Hugging Face name, of
                several names of a tied weight the first one.
        """
        has_two_stages = is_dualpipev(deepspeed_engine)
        super().__init__(
            deepspeed_engine,
            world,
            stages[0].mapper,
            task=stages[0].task_module.task,
            max_grad_norm=max_grad_norm,
            loss_pipeline_rank=0 if has_two_stages else world.topology.pipeline - 1,
        )
        self._pipeline: DeepSpeedPipelineEngine = deepspeed_engine
        self._stages, self._parameter_ranks = stages, parameter_ranks
        self._shared = list(shared_parameters(self.models, parameter_ranks, world))
        self._min_micro_batches = 2 * world.topology.pipeline if has_two_stages else 1
        """Fewest micro-batches of a schedule."""

        self._clock = PipelineClock(world.device, world.phases.advance)
        self._grad_norm: Tensor | None = None
        self._verify_step: int | None = None
        self._before_update: Callable[[], None] | None = None
        hooks = ScheduleHooks(
            around_pass=self._clock.timed,
            after_backward=lambda index: stages[index].verify_gradients(),
            reduce_shared_gradients=self._reduce_shared_gradients,
            before_update=self._finish_schedule,
            after_update=self._verify_replicas,
        )
        replace_instructions(deepspeed_engine, hooks)

    @property
    def models(self) -> list[nn.Module]:
        """See `Engine.models`."""
        return [stage.model for stage in self._stages]

    @property
    def pipeline_ranks_of_weights(self) -> Mapping[str, tuple[int, ...]]:
        """See `BaseEngine.pipeline_ranks_of_weights`."""
        return self._parameter_ranks

    # Training ---------------------------------------------------------------------------------------------------------

    def train_step(
        self,
        batch: StepBatch,
        *,
        verify_step: int | None = None,
        before_update: Callable[[], None] | None = None,
    ) -> StepResult:
        """See `Engine.train_step`. Collective: all ranks must call it."""
        learning_rate = self._learning_rate()
        if self._is_first_step:
            self._check_same_samples(batch.micro_batches[0])
            self._is_first_step = False
        normalization = LossNormalization.for_step(batch, self._world.topology, engine_divides=True)
        for stage in self._stages:
            stage.load_micro_batches(batch.micro_batches, normalization)
        self._verify_step, self._before_update = verify_step, before_update
        self._clock.begin()
        run_training_schedule(self._pipeline)
        return self._step_result(
            (self._stages[-1].sums.loss, self._stages[-1].auxiliary_sum),
            grad_norm=self._grad_norm,
            learning_rate=learning_rate,
            micro_batches=len(batch.micro_batches),
            idle_share=self._clock.idle_share,
        )

    def _reduce_shared_gradients(self) -> None:
        """Sum the gradients of weights that several stages hold.

        Collective: all pipeline ranks that hold a weight must call it.
        """
        self._clock.end()
        for weight, group in self._shared:
            dist.all_reduce(gradient_to_reduce(self._pipeline, weight), group=group)

    def _finish_schedule(self) -> None:
        self._grad_norm = self._finish_gradients(self._verify_step, self._before_update)

    def _verify_replicas(self) -> None:
        if self._verify_step is not None:
            self.replica_verifier.verify(self._verify_step)

    # Evaluation -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> Evaluation:
        """See `Engine.evaluate`. Collective: all ranks must call it."""
        sums = LossAccumulator(self._task, self._world.device)
        remaining, count = iter(batches), EVALUATION_MICRO_BATCHES_PER_STAGE * self._world.topology.pipeline
        with evaluating(self._pipeline):
            while micro_batches := tuple(islice(remaining, count)):
                sums.targets += sum(micro_batch.num_targets for micro_batch in micro_batches)
                self._run_forward(micro_batches)
                sums.add(self._stages[-1].sums.loss, self._stages[-1].sums.extra)
        return self._reduce_evaluation(sums)

    @torch.no_grad()
    def target_losses(self, micro_batch: MicroBatch) -> Tensor | None:
        """See `Engine.target_losses`. Collective: all ranks must call it.

        Returns:
            fp32 in the shape of the labels, 0 where a label is ignored; None on stages that do not compute the loss.
        """
        with evaluating(self._pipeline):
            self._run_forward((micro_batch,))
        return self._stages[-1].first_target_losses

    def _run_forward(self, micro_batches: tuple[MicroBatch, ...]) -> None:
        """Compute the losses of micro-batches in one schedule without backward passes; the stages keep the sums."""
        if self._min_micro_batches > 1:
            micro_batches = pad_to_common_shape(micro_batches, self._min_micro_batches)
        for stage in self._stages:
            stage.load_micro_batches(micro_batches)
        run_evaluation_schedule(self._pipeline, len(micro_batches))

    # Weights ----------------------------------------------------------------------------------------------------------

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.full_weights`. Collective: all ranks must iterate to the end.

        Of the pipeline ranks that hold a weight, the first one broadcasts it.
        """
        topology = self._world.topology
        ranks, group = topology.ranks_of("pipeline"), self._world.groups.of("pipeline")
        local = local_parameters(self.models)
        dtype = next(iter(self._pipeline.module.parameters())).dtype
        for name, shape in self._full_shapes():
            source = self._parameter_ranks[name][0]
            if topology.pipeline_rank == source:
                joined = [
                    full for part, shard in local[name] for _, full in self._joiner.add(name, part.detach(), shard)
                ]
                weight = joined[-1].contiguous()
            else:
                weight = torch.empty(shape, dtype=dtype, device=self._world.device)
            dist.broadcast(weight, ranks[source], group=group)
            yield name, weight
        yield from self._persistent_buffers()

    def _full_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """First name and full shape of every parameter, in the same order on all ranks."""
        seen = set()
        for name, parameter in local_and_remote_parameters(self.models[0]):
            shard = shard_of(parameter)
            first_name = name if shard is None else shard.name
            if first_name in self._parameter_ranks and first_name not in seen:
                seen.add(first_name)
                yield first_name, tuple(parameter.shape) if shard is None else shard.full_shape
