"""The `deepspeed` section: a standard DeepSpeed configuration, checked at every depth, and the only writer of
what DeepSpeed receives.

DeepSpeed itself ignores an unknown top-level key and drops a nested "auto" in silence. Here its own pydantic
classes are mirrored with our strictness, every key of an optimizer or scheduler is compared with the
arguments of its class, and every "auto" is resolved exactly or refused.
"""

from trainer.config.deepspeed.missing import missing_values
from trainer.config.deepspeed.normalize import fp32_instead_of_bf16, normalized
from trainer.config.deepspeed.optimizers import first_rates, optimizer_problems, scheduler_problems, weight_decay
from trainer.config.deepspeed.refused import REFUSED
from trainer.config.deepspeed.resolve import (
    AUTO_BUCKETS,
    Batch,
    batch_arithmetic,
    clips_itself,
    extensions_of,
    for_engine,
    nvme_can_be_read,
    own_schedule,
    resolve,
    smallest_data_ranks,
)
from trainer.config.deepspeed.section import RESOLVED_AUTOS, DeepSpeedSection, class_problems

__all__ = [
    "AUTO_BUCKETS",
    "REFUSED",
    "RESOLVED_AUTOS",
    "Batch",
    "DeepSpeedSection",
    "batch_arithmetic",
    "class_problems",
    "clips_itself",
    "extensions_of",
    "first_rates",
    "for_engine",
    "fp32_instead_of_bf16",
    "missing_values",
    "normalized",
    "nvme_can_be_read",
    "optimizer_problems",
    "own_schedule",
    "resolve",
    "scheduler_problems",
    "smallest_data_ranks",
    "weight_decay",
]
