"""One interface over DeepSpeed's engines."""

from trainer.engine.interface import Engine, Evaluation, StepResult
from trainer.engine.start import start_engine
from trainer.engine.state import Numbers, Piece, Scalars, TrainingState, merged

__all__ = [
    "Engine",
    "Evaluation",
    "Numbers",
    "Piece",
    "Scalars",
    "StepResult",
    "TrainingState",
    "merged",
    "start_engine",
]
