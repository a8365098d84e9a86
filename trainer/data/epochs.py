"""Optimizer steps of `training.epochs`, and how many epochs a number of steps reads."""

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
    """Optimizer steps that read `epochs` epochs; the last step's batch is completed from the next epoch.

    Args:
        epochs: taken as the decimal number that it is written as, so that 0.1 is a tenth.
        epoch_samples: samples of one epoch, over all sources. batch: samples of one step, over all ranks.
    """
    return max(1, math.ceil(Fraction(str(epochs)) * epoch_samples / batch))


def build_sample_order(loaded: LoadedConfig, samples: Sequence[int], weights: Sequence[float]) -> SampleOrder:
    """The order in which the training data are read.

    Args:
        samples: of each source's files. weights: how often an epoch reads each.
    """
    return SampleOrder(tuple(samples), tuple(weights), loaded.config.run.seed)


def resolve_steps(loaded: LoadedConfig, prepared: PreparedData) -> LoadedConfig:
    """`loaded`, resolved with the number of optimizer steps that `training.epochs` comes to; `loaded` itself where
    `training.max_steps` gives it.

    The number follows from the token files, so all ranks that have the same ones derive the same number.

    Raises:
        ConfigError: the schedule does not fit this number of steps.
        DataError: a source too small for one sample.
    """
    epochs, data = loaded.config.training.epochs, loaded.config.data
    if epochs is None:
        return loaded
    task = TASKS[loaded.config.model.task]
    samples = [len(task.open_samples(tokens, data)) for tokens in prepared.train]
    epoch = build_sample_order(loaded, samples, prepared.weights).epoch_samples
    steps = steps_for_epochs(epochs, epoch, loaded.batch.batch_size)
    log.info("training.epochs %g: %s steps of %d samples; an epoch has %s samples", epochs, f"{steps:,}",
             loaded.batch.batch_size, f"{epoch:,}")  # fmt: skip
    resolved = with_steps(loaded, steps)
    for problem in resolved.warnings:
        if problem not in loaded.warnings:
            log.warning("%s", problem)
    return resolved
