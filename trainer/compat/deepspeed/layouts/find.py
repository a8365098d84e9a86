"""Finds the layout of an optimizer of DeepSpeed."""

from __future__ import annotations

import torch

from trainer.compat.deepspeed.internals import (
    BF16_Optimizer,
    DeepSpeedZeroOptimizer,
    DeepSpeedZeroOptimizer_Stage3,
    FP16_Optimizer,
    FP16_UnfusedOptimizer,
)
from trainer.compat.deepspeed.layouts.base import HalfPrecisionLayout, OptimizerLayout
from trainer.compat.deepspeed.layouts.zero import Zero3Layout, Zero12Layout


def layout_of(optimizer: object) -> OptimizerLayout:
    """Find the layout of DeepSpeed's optimizer, or of torch's own where DeepSpeed does not wrap it."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return Zero3Layout(optimizer)
    if isinstance(optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer):
        return Zero12Layout(optimizer)
    if isinstance(optimizer, FP16_Optimizer | FP16_UnfusedOptimizer):
        return HalfPrecisionLayout(optimizer)
    assert isinstance(optimizer, torch.optim.Optimizer), type(optimizer)
    return OptimizerLayout(optimizer)
