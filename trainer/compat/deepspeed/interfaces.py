"""Protocols of DeepSpeed's engines and optimizers as Tessera uses them; DeepSpeed itself is not annotated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Settings = dict[str, Any]
"""DeepSpeed's configuration."""

ParameterGroup = dict[str, Any]
"""A parameter group of torch's optimizers: `params`, and options such as `lr`."""


class Scheduler(Protocol):
    """A learning rate schedule of DeepSpeed, of torch, or of ours."""

    def step(self) -> None:
        """Set the rate of the next optimizer step."""


class WrappedOptimizer(Protocol):
    """DeepSpeed's optimizer around one of torch, or torch's own at ZeRO 0 in fp32."""

    param_groups: list[ParameterGroup]


class DeepSpeedEngine(Protocol):
    """The engine that `deepspeed.initialize` returns for a module."""

    module: nn.Module
    optimizer: WrappedOptimizer
    lr_scheduler: Scheduler | None
    global_steps: int
    global_samples: int
    skipped_steps: int
    micro_steps: int

    __call__: Callable[..., Any]

    def backward(self, loss: Tensor, *, scale_wrt_gas: bool = True) -> Tensor:
        """Compute gradients; at the last micro-batch of a step, also reduce them over the data ranks."""

    def step(self) -> None:
        """Update the weights, at the last micro-batch of a step."""

    def train(self) -> object:
        """Switch the module to training."""

    def eval(self) -> object:
        """Switch the module to evaluation."""

    def get_global_grad_norm(self) -> Tensor | float | None:
        """Return the norm of the last step's gradients before clipping; None where DeepSpeed does not compute it."""

    def was_step_applied(self) -> bool:
        """Return False if the last update was skipped because a gradient was not finite."""

    def gradient_accumulation_steps(self) -> int:
        """Return the number of micro-batches of one step."""


class DeepSpeedPipelineEngine(DeepSpeedEngine, Protocol):
    """The engine that `deepspeed.initialize` returns for a `PipelineModule`."""

    dynamic_shape: bool
    micro_batches: int
    timers: Callable[[str], Any]

    def train_batch(self, data_iter: Iterator[object]) -> Tensor:
        """Run the training schedule, including the optimizer step."""

    def eval_batch(
        self,
        data_iter: Iterator[object],
        *,
        compute_loss: bool,
        reduce_output: str | None,
        bcast_loss: bool,
        num_micro_batches: int,
    ) -> object:
        """Run the forward passes of a schedule."""

    def reset_activation_shape(self) -> None:
        """Exchange the shapes of activations again in the next schedule."""


class MPUProtocol(Protocol):
    """Megatron's `mpu`: the interface through which DeepSpeed gets its process groups."""

    def get_data_parallel_group(self) -> torch.distributed.ProcessGroup:
        """Return the ranks that hold the same weights and read other samples."""
