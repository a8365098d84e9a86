"""Tensor parallelism: a plan for each weight, cut layers, and the record of what a rank holds."""

from trainer.parallel.boxes import boxes_of, flat_boxes, parts_in_whole
from trainer.parallel.elsewhere import all_parameters, fill_elsewhere, lies_elsewhere, put_elsewhere
from trainer.parallel.experts import choose_experts_implementation
from trainer.parallel.join import Joiner
from trainer.parallel.loss import IGNORED, VocabularyCrossEntropy
from trainer.parallel.mapper import Mapper, TensorMapper, WholeModel, drops, tensor_mapper
from trainer.parallel.plan import Plan, read_plan
from trainer.parallel.sequence import refuse_sequence_parallel
from trainer.parallel.shard import Shard, counts, shard_of
from trainer.parallel.styles import Style, starred

__all__ = [
    "IGNORED",
    "Joiner",
    "Mapper",
    "Plan",
    "Shard",
    "Style",
    "TensorMapper",
    "VocabularyCrossEntropy",
    "WholeModel",
    "all_parameters",
    "boxes_of",
    "choose_experts_implementation",
    "counts",
    "drops",
    "fill_elsewhere",
    "flat_boxes",
    "lies_elsewhere",
    "parts_in_whole",
    "put_elsewhere",
    "read_plan",
    "refuse_sequence_parallel",
    "shard_of",
    "starred",
    "tensor_mapper",
]
