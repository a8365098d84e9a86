"""The gradient norm where ranks have different numbers of parameter groups.

DeepSpeed 0.19 reduces the norm of each group over the pipeline stages and tensor ranks, so all of them must have the
same number of groups. They do not: a stage or a tensor rank may hold no weight of a group. Here each rank combines the
norms of its groups, and one reduction sums their squares.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from trainer.compat.deepspeed.internals import (
    DeepSpeedZeroOptimizer,
    DeepSpeedZeroOptimizer_Stage3,
    FP16_UnfusedOptimizer,
    combine_grad_norm_groups,
    is_model_parallel_parameter,
    pg_utils,
    unfused_optimizer,
)


def reduce_norm_once(optimizer: Any) -> None:
    """Replace DeepSpeed's reduction of the norm per group, where ranks hold different parts of a model.

    Args:
        optimizer: DeepSpeed's, before its first step, and before `clip_before_muon`.
    """
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        _reduce_once_without_zero(optimizer)
        return
    if not isinstance(optimizer, DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3):
        return
    if not pg_utils.is_parallel(optimizer.model_parallel_group):
        return
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        norm_groups = optimizer._get_norm_groups

        def reduced_norm_groups() -> list[Tensor]:
            with _without_reductions(optimizer):
                norms = norm_groups()
            return [_reduced(optimizer, combine_grad_norm_groups(norms))]

        optimizer._get_norm_groups = reduced_norm_groups
    else:
        global_norm = optimizer.scaled_global_norm

        def reduced_global_norm(norm_type: int = 2) -> Tensor:
            with _without_reductions(optimizer):
                norm = global_norm(norm_type)
            return _reduced(optimizer, norm)

        optimizer.scaled_global_norm = reduced_global_norm


@contextmanager
def _without_reductions(optimizer: Any) -> Iterator[None]:
    """Let the optimizer reduce norms over the data ranks only."""
    optimizer._model_parallel_all_reduce = lambda tensor, op: None
    try:
        yield
    finally:
        del optimizer._model_parallel_all_reduce


def _reduced(optimizer: Any, norm: Tensor) -> Tensor:
    """Norm over all parts of the model. Collective: all ranks of the model-parallel group must call it.

    Args:
        optimizer: DeepSpeed's.
        norm: of this rank's part, scalar; infinite if it is invalid, as `combine_grad_norm_groups` leaves it.

    Returns:
        A scalar on the device of `norm`; infinite if the norm of any part is.
    """
    squared = norm.to(get_accelerator().current_device_name()).square()
    optimizer._model_parallel_all_reduce(tensor=squared, op=dist.ReduceOp.SUM)
    return squared.sqrt().to(norm.device)


def _reduce_once_without_zero(optimizer: Any) -> None:
    """Replace the norm of bf16 at ZeRO 0 without a fused kernel.

    DeepSpeed's also misses the shards of other tensor ranks: it searches the gradient for the flag of a sharded weight.
    """
    mpu = optimizer.mpu
    if mpu is None or not pg_utils.is_parallel(mpu.get_model_parallel_group()):
        return
    step, is_first = optimizer.step, mpu.get_model_parallel_rank() == 0

    def norm_over_model(norm_list: list[float]) -> float:
        squared = torch.zeros((), device=get_accelerator().current_device_name())
        for parameter in (parameter for group in optimizer.fp16_groups for parameter in group):
            if parameter.grad is not None and (is_first or is_model_parallel_parameter(parameter)):
                squared += parameter.grad.float().norm().square()
        dist.all_reduce(squared, group=mpu.get_model_parallel_group())
        return float(squared.sqrt())

    def step_with_norm(*arguments: Any, **options: Any) -> Any:
        replaced = unfused_optimizer.get_weight_norm, unfused_optimizer.get_global_norm
        unfused_optimizer.get_weight_norm = lambda parameters, mpu: 0.0
        unfused_optimizer.get_global_norm = norm_over_model
        try:
            return step(*arguments, **options)
        finally:
            unfused_optimizer.get_weight_norm, unfused_optimizer.get_global_norm = replaced

    optimizer.step = step_with_norm
