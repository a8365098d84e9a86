"""Clipping of gradients before Muon's update instead of after it.

Muon replaces the gradient of each matrix by an orthogonal update, whose norm does not depend on the gradient's. Under
ZeRO 1, 2 and 3 DeepSpeed 0.19 computes the gradient norm over these updates, reports it, and clips updates and all
other gradients with it. Here the norm is that of the gradients, as for every other optimizer; gradients are clipped;
Muon's momentum accumulates the clipped ones; and its update is not clipped again.

At ZeRO 0 this is not needed: gradients are clipped before the optimizer's step, which contains Muon's update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trainer.compat.deepspeed.internals import (
    DeepSpeedZeroOptimizer,
    DeepSpeedZeroOptimizer_Stage3,
    combine_grad_norm_groups,
    is_invalid_grad_norm,
)
from trainer.compat.deepspeed.names import DEEPSPEED, MUON
from trainer.compat.dependency_check import check_names

_EPSILON = 1e-6
"""What DeepSpeed adds to the norm when it clips."""


def clip_before_muon(optimizer: Any) -> None:
    """Clip gradients before the updates of an optimizer of ZeRO that steps matrices with Muon.

    Args:
        optimizer: DeepSpeed's, before its first step.
    """
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3) and optimizer.use_muon:
        check_names(DEEPSPEED, MUON)
        _clip_before_muon_at_stage_3(optimizer)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer) and any(map(_uses_muon, optimizer.optimizer.param_groups)):
        check_names(DEEPSPEED, MUON)
        _clip_before_muon_at_stages_1_and_2(optimizer)


def _uses_muon(group: dict[str, Any]) -> bool:
    return bool(group.get("use_muon", False))


def _scale(optimizer: Any, norm: Tensor, *, is_unscaled: bool) -> Tensor | None:
    """Factor that clips a gradient; None if it is 1.

    Args:
        optimizer: DeepSpeed's.
        norm: of all gradients, times the loss scale, scalar.
        is_unscaled: whether gradients are divided by the loss scale elsewhere.
    """
    loss_scale = 1.0 if is_unscaled else float(optimizer.loss_scale)
    if optimizer.clip_grad <= 0:
        return None if loss_scale == 1 else torch.tensor(1 / loss_scale)
    excess = (norm / optimizer.loss_scale + _EPSILON) / optimizer.clip_grad
    return 1 / (torch.clamp(excess, min=1.0) * loss_scale)


@contextmanager
def _scaled_gradients(scale: Tensor | None) -> Iterator[None]:
    """Give Muon scaled gradients within. DeepSpeed looks up the function at every call."""
    from deepspeed.runtime.zero.muon import original_muon  # importing it compiles kernels

    if scale is None:
        yield
        return
    update = original_muon.muon_update

    def scaled(grad: Tensor, *arguments: Any, **options: Any) -> Tensor:
        result: Tensor = update(grad.mul_(scale.to(grad.device)), *arguments, **options)
        return result

    original_muon.muon_update = scaled
    try:
        yield
    finally:
        original_muon.muon_update = update


def _skip_clipping(optimizer: Any, is_update: Callable[[Any], bool]) -> None:
    """Divide Muon's updates by the loss scale only, where DeepSpeed would also clip them.

    Args:
        optimizer: DeepSpeed's.
        is_update: whether the first argument of `unscale_and_clip_grads` stands for updates of Muon.
    """
    unscale_and_clip = optimizer.unscale_and_clip_grads

    def unscale(gradients: Any, norm: Tensor) -> None:
        threshold = optimizer.clip_grad
        optimizer.clip_grad = 0.0 if is_update(gradients) else threshold
        unscale_and_clip(gradients, norm)
        optimizer.clip_grad = threshold

    optimizer.unscale_and_clip_grads = unscale


def _clip_before_muon_at_stage_3(optimizer: Any) -> None:
    apply_muon, norm_groups = optimizer._apply_muon_to_accumulated_grads, optimizer._get_norm_groups

    @torch.no_grad()
    def norms_before_muon() -> list[Tensor]:
        optimizer.sub_groups_lacking_loss_scale.clear()
        norms: list[Tensor] = norm_groups()
        norm = combine_grad_norm_groups(norms)
        if not is_invalid_grad_norm(norm):  # else the step is skipped
            with _scaled_gradients(_scale(optimizer, norm, is_unscaled=bool(optimizer.offload_optimizer))):
                apply_muon()
        return norms

    optimizer._apply_muon_to_accumulated_grads = lambda: None
    optimizer._get_norm_groups = norms_before_muon
    _skip_clipping(optimizer, optimizer.sub_groups_using_muon.__getitem__)


def _clip_before_muon_at_stages_1_and_2(optimizer: Any) -> None:
    offloads = bool(optimizer.cpu_offload)
    global_norm, flat_partition = optimizer.scaled_global_norm, optimizer.get_flat_partition
    apply_muon = optimizer._apply_muon_updates_cpu_offload
    pending: dict[int, tuple[list[Tensor], Callable[[], list[Tensor]]]] = {}
    """For each group of matrices: its gradients, and the function that computes this rank's partition of updates."""

    def flat_gradients(parameters: list[Tensor], *arguments: Any, param_group_idx: int, **options: Any) -> list[Tensor]:
        """Flatten the gradients themselves; the updates are computed once the norm is known."""

        def flatten() -> list[Tensor]:
            flat: list[Tensor] = flat_partition(parameters, *arguments, param_group_idx=param_group_idx, **options)
            return flat

        if not parameters or not optimizer._is_muon_group(parameters):
            return flatten()
        pending[param_group_idx] = list(optimizer.all_grad_tensors[param_group_idx]), flatten
        for parameter in parameters:
            parameter.use_muon = False  # type: ignore[attr-defined]
        gradients = flatten()
        for parameter in parameters:
            parameter.use_muon = True  # type: ignore[attr-defined]
        return gradients

    @torch.no_grad()
    def norm_before_muon(norm_type: int = 2) -> Tensor:
        optimizer.groups_lacking_loss_scale.clear()
        norm: Tensor = global_norm(norm_type)
        checks = optimizer.dtype != torch.bfloat16 or optimizer.check_grad_overflow
        if not (checks and is_invalid_grad_norm(norm)):  # else the step is skipped
            with _scaled_gradients(_scale(optimizer, norm, is_unscaled=offloads)):
                if offloads:
                    apply_muon()
                for group, (gradients, flatten) in pending.items():
                    optimizer.all_grad_tensors[group] = gradients
                    optimizer.averaged_gradients[group] = flatten()
                    optimizer.all_grad_tensors[group] = None
        pending.clear()
        return norm

    def is_update(gradients: list[Tensor]) -> bool:
        flats = zip(optimizer.optimizer.param_groups, optimizer.single_partition_of_fp32_groups, strict=True)
        return any(_uses_muon(group) and flat.grad is gradients[0] for group, flat in flats)

    optimizer.get_flat_partition = flat_gradients
    optimizer._apply_muon_updates_cpu_offload = lambda: None
    optimizer.scaled_global_norm = norm_before_muon
    _skip_clipping(optimizer, is_update)
