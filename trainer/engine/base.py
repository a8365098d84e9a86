"""What DeepSpeed's two engines have in common here: norms, exchanges, and whether ranks read what they should."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.compat.deepspeed.optimizer_layouts import layout_of
from trainer.distributed import World
from trainer.engine.interface import Evaluation, StepResult
from trainer.engine.replica_verifier import ReplicaVerifier
from trainer.engine.state import TrainingState
from trainer.errors import DataError
from trainer.sharding import Joiner, is_owned
from trainer.tasks import MicroBatch, Task
from trainer.tensor_parallel import Mapper
from trainer.topology import Axis


class EvaluationSums:
    """Sums over the micro-batches that this rank has evaluated."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.extra = {name: torch.zeros((), dtype=torch.float64, device=device) for name in task.extra_sums}
        self.targets = 0

    def add(self, loss: Tensor, extra: Mapping[str, Tensor]) -> None:
        """Add sums over some micro-batches (scalars)."""
        self.loss = self.loss + loss
        for name in self.extra:
            self.extra[name] = self.extra[name] + extra[name]


class BaseEngine:
    """An engine of DeepSpeed with the model of this rank.

    The loss of a micro-batch is its summed cross entropy times data ranks / tokens of the global batch. DeepSpeed
    averages gradients over the data ranks, so their sum is the gradient of the token-weighted mean over the
    global batch, whatever the layout and however unevenly the tokens are spread.
    """

    def __init__(
        self,
        engine: Any,
        world: World,
        mapper: Mapper,
        max_grad_norm: float | None,
        *,
        task: Task,
        loss_stage: int = 0,
    ) -> None:
        self._engine, self._world, self._mapper, self._task = engine, world, mapper, task
        self._max_grad_norm = max_grad_norm
        """The norm to clip at where this engine clips; None where DeepSpeed does."""

        self._first_backward_pending = True
        """Until the first backward pass is through."""

        self._joiner = Joiner(world.groups.get("tensor"), world.topology.tensor)
        self._parameters = [p for p in engine.module.parameters() if p.requires_grad]
        self._norm_parameters = [p for p in self._parameters if is_owned(p)]
        self._reports_loss = world.topology.tensor_rank == 0 and world.topology.stage == loss_stage
        """Whether this rank speaks for the ranks that work on the same samples."""

    def _learning_rate(self) -> float:
        """The unscaled learning rate; of Muon's two, the matrices'."""
        groups = self._engine.optimizer.param_groups
        return float(next((group for group in groups if group.get("use_muon")), groups[0])["lr"])

    def _model_axes(self) -> list[Axis]:
        """Axes along which ranks hold different weights and read the same samples."""
        axes: tuple[Axis, ...] = ("tensor", "pipeline")
        return [axis for axis in axes if axis in self._world.groups]

    def _check_same_samples(self, micro: MicroBatch) -> None:
        """Looks whether the ranks that share a model were given the same samples, as all they compute supposes."""
        checksum = 0
        for _, tensor in sorted(micro.inputs.items()):
            checksum = zlib.crc32(tensor.numpy().tobytes(), checksum)
        for axis in self._model_axes():
            ranks = self._world.topology.group(axis)
            checksums: list[int | None] = [None] * len(ranks)
            dist.all_gather_object(checksums, checksum, group=self._world.groups[axis])
            if len(set(checksums)) > 1:
                raise DataError(
                    f"rank {self._world.topology.rank}: the ranks {ranks} of a {axis} group read different samples. "
                    "They must see the same data: is data.cache_dir, or a data file, another one on some host?"
                )

    def _clip_gradients(self, max_norm: float) -> Tensor:
        """Norm of all gradients, which are then scaled down to `max_norm`; stays on the device."""
        norm = nn.utils.get_total_norm([p.grad for p in self._norm_parameters if p.grad is not None])
        squared = norm.square().to(self._world.device)
        for axis in self._model_axes():
            dist.all_reduce(squared, group=self._world.groups[axis])
        norm = squared.sqrt()
        if max_norm > 0:
            nn.utils.clip_grads_with_norm_(self._parameters, max_norm, norm)
        return norm

    def _step_result(
        self, sums: tuple[Tensor, Tensor], norm: Tensor | None, learning_rate: float, count: int,
        idle_share: Callable[[], float] | None = None,
    ) -> StepResult:  # fmt: skip
        """What a step left; of the ranks that work on the same samples, one has its losses.

        Args:
            sums: of the loss and the auxiliary loss. norm: None where DeepSpeed has computed it. count: micro-batches.
        """
        loss_sum, auxiliary_sum = sums if self._reports_loss else map(torch.zeros_like, sums)
        if norm is None:
            norm = self._engine.get_global_grad_norm()
        applied = bool(self._engine.was_step_applied())
        return StepResult(
            loss_sum, auxiliary_sum, norm, learning_rate, count if self._reports_loss else 0, applied, idle_share
        )

    def _reduce_evaluation(self, sums: EvaluationSums) -> Evaluation:
        """Return the evaluation over all ranks. Collective: all ranks must call it."""
        names = self._task.extra_sums
        values: list[Tensor | float] = [sums.loss, float(sums.targets), *(sums.extra[name] for name in names)]
        if not self._reports_loss:
            values = [0.0] * len(values)
        loss, targets, *extra = map(sum, zip(*self.all_gather_scalars(values), strict=True))
        count = max(1, int(targets))
        means = {name: value / count for name, value in zip(names, extra, strict=True)}
        return Evaluation(loss / count, int(targets), self._task.metrics(loss / count, means))

    def _persistent_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """The buffers that the model is stored with, whole. On all ranks."""
        model = self.models[0]
        persistent = model.state_dict(keep_vars=True)
        for name, buffer in model.named_buffers():
            if name in persistent:
                yield name, self._mapper.full_buffer(name, buffer)

    @property
    def models(self) -> list[nn.Module]:
        """The Hugging Face model of each of this rank's stages."""
        raise NotImplementedError

    @property
    def stages_of_shared_weights(self) -> Mapping[str, tuple[int, ...]]:
        """Ranks of the pipeline that hold each weight; empty without a pipeline."""
        return {}

    @cached_property
    def _replica_verifier(self) -> ReplicaVerifier:
        return ReplicaVerifier(
            self.models, self.stages_of_shared_weights, layout_of(self._engine.optimizer), self._world
        )

    @cached_property
    def state(self) -> TrainingState:
        """See `Engine.state`."""
        return TrainingState(self._engine, self._world, self.models, self._mapper)

    def all_gather_scalars(self, values: list[Tensor | float]) -> list[list[float]]:
        """See `Engine.exchange`."""
        device = self._world.device
        local_values = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device).detach() for v in values])
        gathered = [torch.empty_like(local_values) for _ in range(self._world.topology.world_size)]
        dist.all_gather(gathered, local_values)
        table: list[list[float]] = torch.stack(gathered).tolist()
        return table
