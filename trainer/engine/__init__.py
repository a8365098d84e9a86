"""One interface over DeepSpeed's engines."""

from trainer.engine.interface import Engine, Evaluation, StepResult
from trainer.engine.start import start_engine

__all__ = ["Engine", "Evaluation", "StepResult", "start_engine"]
