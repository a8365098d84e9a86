"""Creation of a DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from torch import nn

from trainer.compat.deepspeed.interfaces import DeepSpeedEngine, ParameterGroup, Scheduler, Settings


def initialize(
    module: nn.Module,
    parameters: list[nn.Parameter] | list[ParameterGroup],
    settings: Settings,
    *,
    schedule: Callable[[torch.optim.Optimizer], Scheduler] | None,
    mpu: Any,
) -> DeepSpeedEngine:
    """Create the engine for a module. Collective: all ranks must call it.

    Args:
        module: that the engine calls.
        parameters: that are trained.
        settings: DeepSpeed's configuration.
        schedule: makes the learning rate schedule; None for that of `settings`.
        mpu: process groups; None for a pipeline, which makes its own.
    """
    options = {} if mpu is None else {"mpu": mpu}
    engine: DeepSpeedEngine
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=parameters, config=settings, lr_scheduler=schedule, **options
    )
    return engine
