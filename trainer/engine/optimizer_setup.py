"""Optimizer setup of every engine: parameter groups, schedule, gradient norm, Muon's clipping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from trainer.compat.deepspeed.grad_norm import reduce_norm_once
from trainer.compat.deepspeed.initialize import initialize
from trainer.compat.deepspeed.interfaces import DeepSpeedEngine, MPUProtocol, Scheduler, Settings
from trainer.compat.deepspeed.muon import clip_before_muon
from trainer.engine.parameter_groups import ParameterGroups


@dataclass(frozen=True)
class OptimizerSetup:
    """Arguments of `deepspeed.initialize` in addition to its configuration, and corrections of its optimizer."""

    groups: ParameterGroups
    schedule: Callable[[torch.optim.Optimizer], Scheduler] | None
    """Creates Tessera's schedule for torch's optimizer; None if DeepSpeed creates the schedule."""

    def initialize(
        self, module: nn.Module, models: Sequence[nn.Module], settings: Settings, *, mpu: MPUProtocol | None
    ) -> DeepSpeedEngine:
        """Create DeepSpeed's engine for a module. Collective: all ranks must call it.

        Args:
            module: called by the engine; its parameters that require a gradient are trained.
            models: the Hugging Face models in it.
            settings: DeepSpeed's configuration.
            mpu: process groups; None for a pipeline, which makes its own.
        """
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        engine = initialize(module, self.groups.build(trained, models), settings, schedule=self.schedule, mpu=mpu)
        self.groups.install_rate_scales(engine.optimizer)
        reduce_norm_once(engine.optimizer)
        clip_before_muon(engine.optimizer)
        return engine
