"""The training loop: step, log, evaluate, stop."""

from __future__ import annotations

import math
import time

from trainer.config import Config
from trainer.data import Batches
from trainer.engine import Engine
from trainer.errors import TrainingHalted
from trainer.tracking import Meter, Row, Trackers

REMEDY = "Lower the learning rate, lengthen the warm-up, or look at the data of this step"


def fit(config: Config, engine: Engine, batches: Batches, meter: Meter, trackers: Trackers) -> None:
    """Trains for `training.max_steps` steps.

    Raises:
        TrainingHalted: at a step whose update DeepSpeed skipped because a gradient was not finite, and at a logged
            step whose loss or gradient norm is not.
        DataError: from the reading thread, at the step whose batch is wrong.
    """
    last = config.training.max_steps
    evaluate(0, engine, batches, meter, trackers)
    for step, batch in enumerate(meter.timed(batches.train.steps(1, last)), start=1):
        result = engine.train_step(batch)
        meter.add(batch.tokens, batch.samples)
        if not result.applied and config.deepspeed.precision != "fp16":  # there it is the loss scale finding its place
            raise TrainingHalted(f"step {step}: a gradient is not finite. {REMEDY}")
        if step in (1, last) or step % config.training.log_every_steps == 0:
            row = meter.train_row(step, batches.train.epoch_after(step), result, batch.tokens)
            trackers.log(row)
            refuse_nonfinite(row, result.applied)
        if step == last or (config.evaluation.every_steps and step % config.evaluation.every_steps == 0):
            evaluate(step, engine, batches, meter, trackers)


def evaluate(step: int, engine: Engine, batches: Batches, meter: Meter, trackers: Trackers) -> None:
    """Evaluates on the held-out data, where there is any; the time does not count as training."""
    if batches.validation is None:
        return
    start = time.perf_counter()
    trackers.log(meter.validation_row(step, engine.evaluate(batches.validation)))
    meter.pause(time.perf_counter() - start)


def refuse_nonfinite(row: Row, applied: bool) -> None:
    """Halts on a loss that is not finite, or on a gradient that is not and yet was used."""
    loss, norm = row["loss"], row["grad_norm"]
    if math.isfinite(loss) and (norm is None or math.isfinite(norm) or not applied):
        return
    raise TrainingHalted(f"step {row['step']}: loss {loss}, gradient norm {norm}. {REMEDY}")
