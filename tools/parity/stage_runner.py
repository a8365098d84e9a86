"""Runs the forward and backward pass of a model, or of one pipeline stage, without DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from trainer.distributed import World
from trainer.pipeline import Stage, shared_parameters


class SingleStage:
    """The full model, without pipeline parallelism."""

    is_last = True

    def loss(self, compute: Callable[[], Tensor]) -> Tensor:
        """Run forward and backward. Return the loss, detached."""
        loss = compute()
        loss.backward()
        return loss.detach()

    def reports(self, report: Any) -> list[Any]:
        """Gather one value from each stage."""
        return [report]


class PipelineStage:
    """One stage of a model, which exchanges activations and gradients with its neighbors."""

    def __init__(
        self, model: PreTrainedModel, stage: Stage, parameter_ranks: dict[str, tuple[int, ...]], world: World
    ) -> None:
        self._stage, self._world = stage, world
        self._shared = list(shared_parameters([model], parameter_ranks, world))
        self._ranks = world.topology.ranks_of("pipeline")
        self.is_last = stage.is_last

    def loss(self, compute: Callable[[], Tensor]) -> Tensor:
        received = () if self._stage.is_first else self._receive(self._stage.number - 1)
        result = self._stage.run(compute, tuple(tensor.clone() for tensor in received))  # as DeepSpeed does
        if isinstance(result, Tensor):
            result.backward()
        else:
            self._send(result, self._stage.number + 1)
            real = tuple(tensor for tensor in result if tensor.is_floating_point())
            torch.autograd.backward(real, self._receive(self._stage.number + 1))
        if received:
            real = tuple(tensor for tensor in received if tensor.is_floating_point())
            gradients = tuple(torch.zeros_like(t) if t.grad is None else t.grad.contiguous() for t in real)
            self._send(gradients, self._stage.number - 1)
        for parameter, group in self._shared:
            dist.all_reduce(parameter.grad, group=group)
        return result.detach() if isinstance(result, Tensor) else torch.zeros(())

    def reports(self, report: Any) -> list[Any]:
        reports: list[Any] = [None] * len(self._ranks)
        dist.all_gather_object(reports, report, group=self._world.groups.of("pipeline"))
        return reports

    def _send(self, tensors: tuple[Tensor, ...], stage: int) -> None:
        shapes = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        dist.send_object_list([shapes], self._ranks[stage])
        for tensor in tensors:
            dist.send(tensor.detach(), self._ranks[stage])

    def _receive(self, stage: int) -> tuple[Tensor, ...]:
        box: list[Any] = [None]
        dist.recv_object_list(box, self._ranks[stage])
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in box[0]]
        for tensor in tensors:
            dist.recv(tensor, self._ranks[stage])
        return tuple(tensor.requires_grad_(tensor.is_floating_point()) for tensor in tensors)
