"""Tensor parallelism: a plan for each weight, sharded layers, and the mapper that applies the plan to a model."""

from trainer.tensor_parallel.experts import choose_experts_implementation
from trainer.tensor_parallel.mapper import Mapper, TensorMapper, WholeModel, drops, tensor_mapper
from trainer.tensor_parallel.plan import Plan, read_plan
from trainer.tensor_parallel.sequence import refuse_sequence_parallel
from trainer.tensor_parallel.styles import Style

__all__ = [
    "Mapper",
    "Plan",
    "Style",
    "TensorMapper",
    "WholeModel",
    "choose_experts_implementation",
    "drops",
    "read_plan",
    "refuse_sequence_parallel",
    "tensor_mapper",
]
