"""One interface over DeepSpeed's engines."""

from trainer.engine.interface import Engine, Evaluation, StepResult
from trainer.engine.start import start_engine
from trainer.engine.state import BUFFER, WEIGHT, Numbers, Piece, TrainingState, merged

__all__ = [
    "BUFFER",
    "WEIGHT",
    "Engine",
    "Evaluation",
    "Numbers",
    "Piece",
    "StepResult",
    "TrainingState",
    "merged",
    "start_engine",
]
