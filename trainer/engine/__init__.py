"""One interface over DeepSpeed's engines."""

from trainer.engine.build import build_engine
from trainer.engine.interface import (
    Engine,
    Evaluation,
    Scalars,
    ScalarState,
    StepResult,
    TrainingState,
)
from trainer.engine.state import merge_scalars

__all__ = [
    "Engine",
    "Evaluation",
    "ScalarState",
    "Scalars",
    "StepResult",
    "TrainingState",
    "build_engine",
    "merge_scalars",
]
