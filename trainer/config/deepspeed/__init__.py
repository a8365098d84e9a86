"""The `deepspeed` section: a standard DeepSpeed configuration, checked at every depth.

DeepSpeed itself ignores unknown top-level keys and drops a nested "auto" silently. Here its pydantic classes are
mirrored strictly, every key of an optimizer or scheduler is compared with the arguments of its class, and every "auto"
is resolved exactly or refused. No other package writes what DeepSpeed receives.
"""

from trainer.config.deepspeed.missing_values import missing_values
from trainer.config.deepspeed.normalize import fp32_fallback_warnings, normalize_section
from trainer.config.deepspeed.optimizers import (
    first_learning_rates,
    optimizer_problems,
    scheduler_problems,
    weight_decay,
)
from trainer.config.deepspeed.resolve import (
    AUTO_BUCKETS,
    BATCH_KEYS,
    Batch,
    batch_arithmetic,
    custom_schedule,
    deepspeed_clips_gradients,
    engine_settings,
    is_async_io_available,
    min_data_ranks,
    required_extensions,
    resolve,
)
from trainer.config.deepspeed.section import RESOLVED_AUTOS, DeepSpeedSection, deepspeed_class_problems
from trainer.config.deepspeed.unsupported import UNSUPPORTED

__all__ = [
    "AUTO_BUCKETS",
    "BATCH_KEYS",
    "RESOLVED_AUTOS",
    "UNSUPPORTED",
    "Batch",
    "DeepSpeedSection",
    "batch_arithmetic",
    "custom_schedule",
    "deepspeed_class_problems",
    "deepspeed_clips_gradients",
    "engine_settings",
    "first_learning_rates",
    "fp32_fallback_warnings",
    "is_async_io_available",
    "min_data_ranks",
    "missing_values",
    "normalize_section",
    "optimizer_problems",
    "required_extensions",
    "resolve",
    "scheduler_problems",
    "weight_decay",
]
