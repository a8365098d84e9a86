"""How a run optimizes, whichever engine steps: parameter groups, the schedule, Muon's clipping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
from torch import nn

from trainer.engine.groups import ParameterGroups
from trainer.engine.muon import clip_before_muon
from trainer.engine.norm import reduce_norm_once


@dataclass(frozen=True)
class Optimization:
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
            model_parameters=self.groups.of(trained, models),
            config=settings,
            lr_scheduler=self.schedule,
            **options,
        )
        self.groups.scale_rates(engine.optimizer)
        reduce_norm_once(engine.optimizer)
        clip_before_muon(engine.optimizer)
        return engine
