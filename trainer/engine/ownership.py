"""Which rank of a model accounts for a parameter that several ranks hold."""

from __future__ import annotations

from torch import nn

from trainer.compat.deepspeed.flags import is_counted_elsewhere
from trainer.sharding import is_owned


def is_counted(parameter: nn.Parameter) -> bool:
    """Return whether this rank, of the tensor and pipeline ranks that hold the parameter, counts and saves it."""
    return is_owned(parameter) and not is_counted_elsewhere(parameter)
