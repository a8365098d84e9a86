"""Pipeline parallelism: trace a model, assign its layers to stages, run each stage with the family's own code."""

from trainer.pipeline.balance import balance, stage_bounds
from trainer.pipeline.dataflow import Dataflow
from trainer.pipeline.recompute import attention_to_recompute, install_recomputation
from trainer.pipeline.shared_parameters import local_parameters, share_parameters, shared_parameters
from trainer.pipeline.stage import BoundaryTensors, Stage
from trainer.pipeline.stage_assignment import StageAssignment, StageRow, assign_stages, refuse_uses_on_other_stages
from trainer.pipeline.trace import trace_dataflow

__all__ = [
    "BoundaryTensors",
    "Dataflow",
    "Stage",
    "StageAssignment",
    "StageRow",
    "assign_stages",
    "attention_to_recompute",
    "balance",
    "install_recomputation",
    "local_parameters",
    "refuse_uses_on_other_stages",
    "share_parameters",
    "shared_parameters",
    "stage_bounds",
    "trace_dataflow",
]
