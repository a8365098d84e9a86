"""What DeepSpeed's two engines have in common here: norms, exchanges, and whether ranks read what they should."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.data.batches import MicroBatch
from trainer.distributed import World
from trainer.engine.holding import holding_of
from trainer.engine.interface import Evaluation, StepResult
from trainer.engine.replicas import Replicas
from trainer.engine.state import TrainingState
from trainer.errors import DataError
from trainer.sharding import Joiner, counts
from trainer.tensor_parallel import Mapper
from trainer.topology import Axis


class BaseEngine:
    """An engine of DeepSpeed with the model of this rank.

    The loss of a micro-batch is its summed cross entropy times data ranks / tokens of the global batch. DeepSpeed
    averages gradients over the data ranks, so their sum is the gradient of the token-weighted mean over the
    global batch, whatever the layout and however unevenly the tokens are spread.
    """

    def __init__(
        self, engine: Any, world: World, mapper: Mapper, clipping: float | None, *, loss_stage: int = 0
    ) -> None:
        self._engine, self._world, self._mapper = engine, world, mapper
        self._clipping = clipping
        """The norm to clip at where this engine clips; None where DeepSpeed does."""

        self._verifies = True
        """Until the first backward pass is through."""

        self._joiner = Joiner(world.groups.get("tensor"), world.topology.tensor)
        self._parameters = [p for p in engine.module.parameters() if p.requires_grad]
        self._counted = [p for p in self._parameters if counts(p)]
        self._speaks = world.topology.tensor_rank == 0 and world.topology.stage == loss_stage
        """Whether this rank speaks for the ranks that work on the same samples."""

    def _rate(self) -> float:
        """The unscaled learning rate; of Muon's two, the matrices'."""
        groups = self._engine.optimizer.param_groups
        return float(next((group for group in groups if group.get("use_muon")), groups[0])["lr"])

    def _model_axes(self) -> list[Axis]:
        """Axes along which ranks hold different weights and read the same samples."""
        axes: tuple[Axis, ...] = ("tensor", "pipeline")
        return [axis for axis in axes if axis in self._world.groups]

    def _refuse_different_samples(self, micro: MicroBatch) -> None:
        """Looks whether the ranks that share a model were given the same samples, as all they compute supposes."""
        own = zlib.crc32(micro.input_ids_BT.numpy().tobytes())
        for axis in self._model_axes():
            ranks = self._world.topology.group(axis)
            sums: list[int | None] = [None] * len(ranks)
            dist.all_gather_object(sums, own, group=self._world.groups[axis])
            if len(set(sums)) > 1:
                raise DataError(
                    f"rank {self._world.topology.rank}: the ranks {ranks} of a {axis} group read different samples. "
                    "They must see the same data: is data.cache_dir, or a data file, another one on some host?"
                )

    def _clip(self, largest: float) -> Tensor:
        """Norm of all gradients, which are then scaled down to `largest`; stays on the device."""
        norm = nn.utils.get_total_norm([p.grad for p in self._counted if p.grad is not None])
        squared = norm.square().to(self._world.device)
        for axis in self._model_axes():
            dist.all_reduce(squared, group=self._world.groups[axis])
        norm = squared.sqrt()
        if largest > 0:
            nn.utils.clip_grads_with_norm_(self._parameters, largest, norm)
        return norm

    def _result(
        self, sums: tuple[Tensor, Tensor], norm: Tensor | None, rate: float, count: int,
        idle_share: Callable[[], float] | None = None,
    ) -> StepResult:  # fmt: skip
        """What a step left; of the ranks that work on the same samples, one has its losses.

        Args:
            sums: of the loss and the auxiliary loss. norm: None where DeepSpeed has computed it. count: micro-batches.
        """
        loss_sum, auxiliary_sum = sums if self._speaks else map(torch.zeros_like, sums)
        if norm is None:
            norm = self._engine.get_global_grad_norm()
        applied = bool(self._engine.was_step_applied())
        return StepResult(loss_sum, auxiliary_sum, norm, rate, count if self._speaks else 0, applied, idle_share)

    def _evaluation(self, loss_sum: Tensor, tokens: int) -> Evaluation:
        """Over all ranks, from this one's."""
        rows = self.exchange([loss_sum, float(tokens)] if self._speaks else [torch.zeros_like(loss_sum), 0.0])
        whole = int(sum(row[1] for row in rows))
        return Evaluation(sum(row[0] for row in rows) / max(1, whole), whole)

    def _persistent_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """The buffers that the model is stored with, whole. On all ranks."""
        model = self.models[0]
        persistent = model.state_dict(keep_vars=True)
        for name, buffer in model.named_buffers():
            if name in persistent:
                yield name, self._mapper.whole_buffer(name, buffer)

    @property
    def models(self) -> list[nn.Module]:
        """The Hugging Face model of each of this rank's stages."""
        raise NotImplementedError

    @property
    def shared_by_stages(self) -> Mapping[str, tuple[int, ...]]:
        """Ranks of the pipeline that hold each weight; empty without a pipeline."""
        return {}

    @cached_property
    def _replicas(self) -> Replicas:
        return Replicas(self.models, self.shared_by_stages, holding_of(self._engine.optimizer), self._world)

    @cached_property
    def state(self) -> TrainingState:
        """See `Engine.state`."""
        return TrainingState(self._engine, self._world, self.models, self._mapper)

    def exchange(self, values: list[Tensor | float]) -> list[list[float]]:
        """See `Engine.exchange`."""
        device = self._world.device
        own = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device).detach() for v in values])
        rows = [torch.empty_like(own) for _ in range(self._world.topology.world)]
        dist.all_gather(rows, own)
        table: list[list[float]] = torch.stack(rows).tolist()
        return table
