"""Number of optimizer steps of `training.epochs`."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from trainer.config.load import with_steps
from trainer.data.order import SampleOrder
from trainer.tasks import TASKS

if TYPE_CHECKING:
    from trainer.config import LoadedConfig
    from trainer.data.prepare import PreparedData

log = logging.getLogger(__name__)


def steps_for_epochs(epochs: float, epoch_samples: int, batch: int) -> int:
    """Return the optimizer steps that read `epochs` epochs; the last batch is completed from the next epoch.

    Args:
        epochs: interpreted as the decimal number that it is written as, so that 0.1 is exactly one tenth.
        epoch_samples: samples of one epoch, over all sources.
        batch: samples of one step, over all ranks.
    """
    return max(1, math.ceil(Fraction(str(epochs)) * epoch_samples / batch))


def build_sample_order(loaded: LoadedConfig, samples: Sequence[int], weights: Sequence[float]) -> SampleOrder:
    """Build the order in which the training data is read.

    Args:
        loaded: the configuration, of which the seed is used.
        samples: number of samples of each training file.
        weights: how many times an epoch reads each file.
    """
    return SampleOrder(tuple(samples), tuple(weights), loaded.config.run.seed)


def resolve_steps(loaded: LoadedConfig, prepared: PreparedData) -> LoadedConfig:
    """Resolve `training.epochs` to a number of optimizer steps; return `loaded` itself if `training.max_steps` is set.

    The number is derived from the token files, so ranks with equal token files derive equal numbers.

    Raises:
        ConfigError: the schedule does not fit this number of steps.
        DataError: a source is too small for one sample.
    """
    epochs, data = loaded.config.training.epochs, loaded.config.data
    if epochs is None:
        return loaded
    task = TASKS[loaded.config.model.task]
    samples = [len(task.open_samples(tokens, data)) for tokens in prepared.train]
    epoch_samples = build_sample_order(loaded, samples, prepared.weights).epoch_samples
    batch_size = loaded.batch.batch_size
    steps = steps_for_epochs(epochs, epoch_samples, batch_size)
    shown = f"{steps:,}", batch_size, f"{epoch_samples:,}"
    log.info("training.epochs %g: %s steps of %d samples; an epoch has %s samples", epochs, *shown)
    resolved = with_steps(loaded, steps)
    for problem in resolved.warnings:
        if problem not in loaded.warnings:
            log.warning("%s", problem)
    return resolved
