"""Pipeline parallelism: a model is followed, its layers are divided into stages, and each stage is the model itself."""

from trainer.pipeline.balance import balance, divide
from trainer.pipeline.division import ONE_STAGE, Division, divide_layers, refuse_other_uses
from trainer.pipeline.flow import Flow
from trainer.pipeline.recompute import recompute
from trainer.pipeline.shared import pieces_of, shared_weights, unite
from trainer.pipeline.stage import Record, Stage
from trainer.pipeline.trace import example_inputs, follow

__all__ = [
    "ONE_STAGE",
    "Division",
    "Flow",
    "Record",
    "Stage",
    "balance",
    "divide",
    "divide_layers",
    "example_inputs",
    "follow",
    "pieces_of",
    "recompute",
    "refuse_other_uses",
    "shared_weights",
    "unite",
]
