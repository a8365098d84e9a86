"""Training tasks, from samples of token files to losses and metrics."""

from trainer.tasks.causal_lm import CausalLM
from trainer.tasks.example_inputs import example_ids, random_inputs
from trainer.tasks.interface import Collation, Needs, Prediction, Samples, Task, TaskLoss, TokenDocuments
from trainer.tasks.micro_batch import IGNORE_INDEX, MicroBatch, count_targets, pad_to_common_shape
from trainer.tasks.module import TaskModule, auxiliary_coefficient

TASKS: dict[str, Task] = {task.name: task for task in (CausalLM(),)}
"""Implementations by the values of `model.task`."""

__all__ = [
    "IGNORE_INDEX",
    "TASKS",
    "Collation",
    "MicroBatch",
    "Needs",
    "Prediction",
    "Samples",
    "Task",
    "TaskLoss",
    "TaskModule",
    "TokenDocuments",
    "auxiliary_coefficient",
    "count_targets",
    "example_ids",
    "pad_to_common_shape",
    "random_inputs",
]
