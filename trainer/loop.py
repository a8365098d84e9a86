"""The training loop: step, log, evaluate, save, stop."""

from __future__ import annotations

import math
import time

from trainer.checkpoint import CheckpointSaver
from trainer.config import Config, LoadedConfig
from trainer.data import Batches
from trainer.distributed import World
from trainer.engine import Engine
from trainer.errors import TesseraError, TrainingHalted
from trainer.fault_tolerance import StopAgreement
from trainer.tracking import Meter, Row, Trackers

REMEDY = "Lower the learning rate, lengthen the warm-up, or look at the data of this step"


def fit(
    loaded: LoadedConfig, world: World, engine: Engine, batches: Batches, checkpoints: CheckpointSaver, meter: Meter,
    trackers: Trackers, stop: StopAgreement,
) -> None:  # fmt: skip
    """Trains up to the last step, from the beginning or from where the meter's progress says.

    Raises:
        TrainingHalted: at a step whose update DeepSpeed skipped because a gradient was not finite, and at a logged
            step whose loss or gradient norm is not. A step that is to be saved is logged, so that none is saved that
            went wrong.
        ReplicasDifferError: at a step of `training.verify_every_steps`, before it is saved.
        DataError: from the reading thread, at the step whose batch is wrong.
        Preempted: after the step at which all ranks have agreed to stop, once its checkpoint is saved.
    """
    try:
        is_stopped = train(loaded, world, engine, batches, checkpoints, meter, trackers, stop)
    except TesseraError:  # the exit would end the thread that writes a checkpoint
        checkpoints.close()
        raise
    checkpoints.close()
    if is_stopped:
        checkpoints.refuse_unsaved(meter.progress.step)
        raise stop.preemption_error(meter.progress.step)
    world.phases.enter("final", meter.progress.step)


def train(
    loaded: LoadedConfig, world: World, engine: Engine, batches: Batches, checkpoints: CheckpointSaver, meter: Meter,
    trackers: Trackers, stop: StopAgreement,
) -> bool:  # fmt: skip
    """The steps themselves; a checkpoint may still be being written when this returns. Whether they were stopped."""
    config, progress, last = loaded.config, meter.progress, loaded.steps
    first_step = progress.step
    if not first_step:
        evaluate(0, world, engine, batches, meter, trackers)
    for step, batch in enumerate(meter.timed(batches.train.steps(first_step + 1, last)), start=first_step + 1):
        stop.before_step(step)
        world.phases.enter("step", step)
        world.seed_step(step)
        result = engine.train_step(batch, verify_step=step if is_replica_check_due(step, config) else None)
        progress.advance(batch.tokens, batch.samples)
        meter.add(batch.tokens)
        if not result.applied and config.deepspeed.precision != "fp16":  # there it is the loss scale finding its place
            raise TrainingHalted(f"step {step}: a gradient is not finite. {REMEDY}")
        losses: dict[str, float | None] = {}
        is_stopping = stop.stops_after(step)
        is_save_due = is_stopping or checkpoints.is_due(step)
        if is_save_due or step in (1, last) or step % config.training.log_every_steps == 0:
            row = meter.train_row(step, batches.train.epochs_after(step), result, batch.tokens)
            trackers.log(row)
            halt_on_nonfinite(row, result.applied)
            losses["train"] = row["loss"]
        if step == last or (is_multiple(step, config.evaluation.every_steps) and not is_stopping):
            losses["validation"] = evaluate(step, world, engine, batches, meter, trackers)
        if is_save_due:
            world.phases.enter("save", step)
            save(checkpoints, engine, meter, losses, trackers)
        if is_stopping:
            return True
    return False


def is_multiple(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def is_replica_check_due(step: int, config: Config) -> bool:
    """Whether the copies of weights are compared in this step."""
    every = config.training.verify_every_steps
    return every > 0 and step % every == 0


def evaluate(
    step: int, world: World, engine: Engine, batches: Batches, meter: Meter, trackers: Trackers
) -> float | None:
    """The loss on the held-out data, where there is any; the time does not count as training."""
    if batches.validation is None:
        return None
    world.phases.enter("evaluate", step)
    start = time.perf_counter()
    evaluation = engine.evaluate(batches.validation)
    trackers.log(meter.validation_row(step, evaluation))
    meter.pause(time.perf_counter() - start)
    return evaluation.loss


def save(
    checkpoints: CheckpointSaver, engine: Engine, meter: Meter, losses: dict[str, float | None], trackers: Trackers
) -> None:
    """Makes a checkpoint; the time does not count as training."""
    start = time.perf_counter()
    checkpoints.save(engine, meter.progress, losses, trackers=trackers.states())
    meter.pause(time.perf_counter() - start)


def halt_on_nonfinite(row: Row, applied: bool) -> None:
    """Halts on a loss that is not finite, or on a gradient that is not and yet was used."""
    loss, norm = row["loss"], row["grad_norm"]
    if math.isfinite(loss) and (norm is None or math.isfinite(norm) or not applied):
        return
    raise TrainingHalted(f"step {row['step']}: loss {loss}, gradient norm {norm}. {REMEDY}")
