"""Base of the engines with and without a pipeline: clipping, results, gathering, checks of the first step."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.compat.deepspeed.interfaces import DeepSpeedEngine
from trainer.compat.deepspeed.layouts.find import layout_of
from trainer.distributed import World
from trainer.engine.interface import Evaluation, StepResult, TrainingState
from trainer.engine.loss_accumulator import LossAccumulator
from trainer.engine.ownership import is_counted
from trainer.engine.replica_verifier import ReplicaVerifier
from trainer.engine.state import DeepSpeedTrainingState
from trainer.errors import DataError
from trainer.sharding import Joiner
from trainer.tasks import MicroBatch, Task
from trainer.tensor_parallel import Mapper


class BaseEngine(ABC):
    """An engine of DeepSpeed around this rank's part of the model."""

    def __init__(
        self,
        deepspeed_engine: DeepSpeedEngine,
        world: World,
        mapper: Mapper,
        *,
        task: Task,
        max_grad_norm: float | None,
        loss_pipeline_rank: int = 0,
    ) -> None:
        """Wrap an engine of DeepSpeed.

        Args:
            deepspeed_engine: engine from `deepspeed.initialize`.
            world: the world of this rank.
            mapper: mapper of the rank's model, or of its first stage.
            task: the training task.
            max_grad_norm: norm to clip gradients to, 0 for none; None where DeepSpeed clips.
            loss_pipeline_rank: pipeline rank that computes the loss.
        """
        self.deepspeed_engine = deepspeed_engine
        self._world, self._mapper, self._task = world, mapper, task
        self._max_grad_norm = max_grad_norm
        self._is_first_step = True
        self._joiner = Joiner(world.groups.of)
        self._parameters = [p for p in deepspeed_engine.module.parameters() if p.requires_grad]
        self._norm_parameters = [p for p in self._parameters if is_counted(p)]
        self._reports_loss = world.topology.tensor_rank == 0 and world.topology.pipeline_rank == loss_pipeline_rank
        """True on the one rank of each model-parallel group that reports its losses."""

    @property
    @abstractmethod
    def models(self) -> list[nn.Module]:
        """See `Engine.models`."""

    @property
    def pipeline_ranks_of_weights(self) -> Mapping[str, tuple[int, ...]]:
        """Pipeline ranks that hold each weight; empty without a pipeline."""
        return {}

    @cached_property
    def state(self) -> TrainingState:
        """See `Engine.state`."""
        return DeepSpeedTrainingState(self.deepspeed_engine, self._world, self.models, self._mapper)

    @cached_property
    def replica_verifier(self) -> ReplicaVerifier:
        """Compares replicated weights between ranks."""
        layout = layout_of(self.deepspeed_engine.optimizer)
        return ReplicaVerifier(self.models, self.pipeline_ranks_of_weights, layout, self._world)

    # The parts of a step ----------------------------------------------------------------------------------------------

    def _learning_rate(self) -> float:
        """Read the unscaled learning rate; for Muon, that of the matrices."""
        groups = self.deepspeed_engine.optimizer.param_groups
        return float(next((group for group in groups if group.get("use_muon")), groups[0])["lr"])

    def _check_same_samples(self, micro_batch: MicroBatch) -> None:
        """Check that all ranks of a model-parallel group received the same batch.

        Collective: all ranks of the model-parallel group must call it.

        The first step suffices. A batch is a function of its step, the configuration and the token files, none of which
        changes later, and which ranks have compared at start: the files by a fingerprint, which samples them. Here all
        tokens of one micro-batch are compared, as they arrive after sample order and collation.

        Raises:
            DataError: if the batches differ; losses and gradients would mix them.
        """
        checksum = 0
        for _, tensor in sorted(micro_batch.inputs.items()):
            checksum = zlib.crc32(tensor.numpy().tobytes(), checksum)
        for axis in self._world.topology.shares_samples():
            ranks = self._world.topology.ranks_of(axis)
            checksums: list[int | None] = [None] * len(ranks)
            dist.all_gather_object(checksums, checksum, group=self._world.groups.of(axis))
            if len(set(checksums)) > 1:
                raise DataError(
                    f"rank {self._world.topology.rank}: the ranks {ranks} of a {axis} group read different samples. "
                    "They must read the same data: check data.cache_dir and the data files on all hosts"
                )

    def _clip_gradients(self, max_norm: float) -> Tensor:
        """Scale all gradients down to a norm. Collective: all ranks of the model-parallel group must call it.

        Returns:
            The norm before clipping, scalar on the device.
        """
        norm = nn.utils.get_total_norm([p.grad for p in self._norm_parameters if p.grad is not None])
        squared = norm.square().to(self._world.device)
        # A fixed order, because fp32 sums depend on it: a run that resumes stays equal bit for bit.
        for axis in reversed(self._world.topology.shares_samples()):
            dist.all_reduce(squared, group=self._world.groups.of(axis))
        norm = squared.sqrt()
        if max_norm > 0:
            nn.utils.clip_grads_with_norm_(self._parameters, max_norm, norm)
        return norm

    def _finish_gradients(self, verify_step: int | None, before_update: Callable[[], None] | None) -> Tensor | None:
        """Clip and verify between the last backward pass and the update. Collective: all ranks must call it.

        Returns:
            The gradient norm, scalar; None where DeepSpeed computes it.
        """
        if before_update is not None:
            before_update()
        grad_norm = None if self._max_grad_norm is None else self._clip_gradients(self._max_grad_norm)
        if verify_step is not None:
            self.replica_verifier.verify_before_update(verify_step)
        return grad_norm

    def _step_result(
        self,
        sums: tuple[Tensor, Tensor],
        *,
        grad_norm: Tensor | None,
        learning_rate: float,
        micro_batches: int,
        idle_share: Callable[[], float] | None = None,
    ) -> StepResult:
        """Assemble the outcome of a step; of the ranks that read the same samples, one reports the losses.

        Args:
            sums: sums of the loss and of the auxiliary loss, scalars.
            grad_norm: None where DeepSpeed has computed it.
            learning_rate: of this step.
            micro_batches: of this rank.
            idle_share: see `StepResult.idle_share`.
        """
        loss_sum, auxiliary_sum = sums if self._reports_loss else map(torch.zeros_like, sums)
        return StepResult(
            loss_sum,
            auxiliary_sum,
            self.deepspeed_engine.get_global_grad_norm() if grad_norm is None else grad_norm,
            learning_rate,
            micro_batches if self._reports_loss else 0,
            bool(self.deepspeed_engine.was_step_applied()),
            idle_share,
        )

    def _reduce_evaluation(self, sums: LossAccumulator) -> Evaluation:
        """Compute the evaluation over all ranks. Collective: all ranks must call it."""
        names = self._task.extra_sums
        values: list[Tensor | float] = [sums.loss, float(sums.targets), *(sums.extra[name] for name in names)]
        if not self._reports_loss:
            values = [0.0] * len(values)
        loss, targets, *extra = map(sum, zip(*self.all_gather_scalars(values), strict=True))
        count = max(1, int(targets))
        means = {name: value / count for name, value in zip(names, extra, strict=True)}
        return Evaluation(loss / count, int(targets), self._task.metrics(loss / count, means))

    # Gathering --------------------------------------------------------------------------------------------------------

    def all_gather_scalars(self, values: list[Tensor | float]) -> list[list[float]]:
        """See `Engine.all_gather_scalars`. Collective: all ranks must call it."""
        device = self._world.device
        local = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device).detach() for v in values])
        rows = [torch.empty_like(local) for _ in range(self._world.topology.world_size)]
        dist.all_gather(rows, local)
        table: list[list[float]] = torch.stack(rows).tolist()
        return table

    def _persistent_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the buffers that belong to the saved model, in full. Collective: all ranks must iterate to the end."""
        model = self.models[0]
        persistent = model.state_dict(keep_vars=True)
        for name, buffer in model.named_buffers():
            if name in persistent:
                yield name, self._mapper.full_buffer(name, buffer)
