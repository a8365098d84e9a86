"""The Hugging Face model: built, given its weights, its task, its cost, and written back."""

from trainer.model.build import build_model
from trainer.model.cost import ModelCost, model_cost, peak_flops, state_bytes
from trainer.model.export import load_exported, write_model
from trainer.model.initialize import initialize_weights
from trainer.model.tasks import TASKS, TaskLoss

__all__ = [
    "TASKS",
    "ModelCost",
    "TaskLoss",
    "build_model",
    "initialize_weights",
    "load_exported",
    "model_cost",
    "peak_flops",
    "state_bytes",
    "write_model",
]
