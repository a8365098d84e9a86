"""One interface over DeepSpeed's engines."""

from trainer.engine.interface import Engine, Evaluation, StepResult
from trainer.engine.start import start_engine
from trainer.engine.state import Scalars, ScalarState, TensorChunk, TrainingState, merge_scalars

__all__ = [
    "Engine",
    "Evaluation",
    "ScalarState",
    "Scalars",
    "StepResult",
    "TensorChunk",
    "TrainingState",
    "merge_scalars",
    "start_engine",
]
