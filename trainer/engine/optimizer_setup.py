"""How a run optimizes, whichever engine steps: parameter groups, the schedule, Muon's clipping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
from torch import nn

from trainer.compat.deepspeed.grad_norm import reduce_norm_once
from trainer.compat.deepspeed.muon import clip_before_muon
from trainer.engine.parameter_groups import ParameterGroups


@dataclass(frozen=True)
class OptimizerSetup:
    """What `deepspeed.initialize` is told beside its configuration, and what its optimizers lack."""

    groups: ParameterGroups
    schedule: Callable[[Any], Any] | None
    """From torch's optimizer to a schedule of ours; None where DeepSpeed makes it."""

    def initialize(
        self, module: nn.Module, models: Sequence[nn.Module], settings: dict[str, Any], **options: Any
    ) -> Any:
        """DeepSpeed's engine for a module.

        Args:
            module: what the engine calls; its parameters that require a gradient are trained.
            models: the Hugging Face models in it. options: further ones of `deepspeed.initialize`.
        """
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=self.groups.build(trained, models),
            config=settings,
            lr_scheduler=self.schedule,
            **options,
        )
        self.groups.install_rate_scales(engine.optimizer)
        reduce_norm_once(engine.optimizer)
        clip_before_muon(engine.optimizer)
        return engine
