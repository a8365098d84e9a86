"""Tensor parallelism: a plan for each weight, sharded layers, and the mapper that applies the plan to a model."""

from trainer.tensor_parallel.audit import resolve_plan
from trainer.tensor_parallel.experts import choose_experts_implementation
from trainer.tensor_parallel.mapper import (
    IdentityMapper,
    Mapper,
    TensorMapper,
    build_mapper,
    has_active_dropout,
    model_region,
)
from trainer.tensor_parallel.plan import Plan
from trainer.tensor_parallel.sequence import refuse_sequence_parallel
from trainer.tensor_parallel.styles import Style

__all__ = [
    "IdentityMapper",
    "Mapper",
    "Plan",
    "Style",
    "TensorMapper",
    "build_mapper",
    "choose_experts_implementation",
    "has_active_dropout",
    "model_region",
    "refuse_sequence_parallel",
    "resolve_plan",
]
