"""The gradient norm of ZeRO's optimizers, for ranks with different numbers of parameter groups.

DeepSpeed 0.19 reduces the norm of each group over the pipeline stages and tensor ranks, so all of them must have as
many groups. They do not: a stage or a tensor rank may hold no weight of a group. Here each rank combines the norms of
its groups, and one reduction sums their squares.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.comm import pg_utils
from deepspeed.runtime.fp16 import unfused_optimizer
from deepspeed.runtime.utils import combine_grad_norm_groups, is_model_parallel_parameter
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor


def reduce_norm_once(optimizer: Any) -> None:
    """Changes how one of DeepSpeed's optimizers computes the norm, where ranks hold different parts of a model.

    Args:
        optimizer: DeepSpeed's, before its first step, and before `clip_before_muon`.
    """
    if isinstance(optimizer, unfused_optimizer.FP16_UnfusedOptimizer):
        _reduce_once_at_stage_0(optimizer)
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
    """Meanwhile the optimizer reduces over the data ranks only."""
    optimizer._model_parallel_all_reduce = lambda tensor, op: None
    try:
        yield
    finally:
        del optimizer._model_parallel_all_reduce


def _reduced(optimizer: Any, norm: Tensor) -> Tensor:
    """The norm over all parts of the model, on the device of `norm`; infinite if one of the parts' norms is not finite.

    Args:
        norm: of this rank's part, scalar; infinite if invalid, as `combine_grad_norm_groups` leaves it.
    """
    squared = norm.to(get_accelerator().current_device_name()).square()
    optimizer._model_parallel_all_reduce(tensor=squared, op=dist.ReduceOp.SUM)
    return squared.sqrt().to(norm.device)


def _reduce_once_at_stage_0(optimizer: Any) -> None:
    """In bf16, where DeepSpeed has no fused kernel. Its own norm also misses what other tensor ranks alone hold: it
    looks for the mark of a weight that is cut at the gradient."""
    if optimizer.mpu is None or not pg_utils.is_parallel(optimizer.mpu.get_model_parallel_group()):
        return
    step, first = optimizer.step, optimizer.mpu.get_model_parallel_rank() == 0

    def norm_of_all(norm_list: list[float]) -> float:
        squared = torch.zeros((), device=get_accelerator().current_device_name())
        for parameter in (parameter for group in optimizer.fp16_groups for parameter in group):
            if parameter.grad is not None and (first or is_model_parallel_parameter(parameter)):
                squared += parameter.grad.float().norm().square()
        dist.all_reduce(squared, group=optimizer.mpu.get_model_parallel_group())
        return float(squared.sqrt())

    def step_with_norm(*arguments: Any, **options: Any) -> Any:
        replaced = unfused_optimizer.get_weight_norm, unfused_optimizer.get_global_norm
        unfused_optimizer.get_weight_norm = lambda parameters, mpu: 0.0
        unfused_optimizer.get_global_norm = norm_of_all
        try:
            return step(*arguments, **options)
        finally:
            unfused_optimizer.get_weight_norm, unfused_optimizer.get_global_norm = replaced

    optimizer.step = step_with_norm
