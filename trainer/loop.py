"""The training loop: step, log, evaluate, save, stop."""

from __future__ import annotations

import math
import time

from trainer.assembly import Trainer
from trainer.config import Config
from trainer.errors import TesseraError, TrainingHalted
from trainer.fault_tolerance import StopAgreement
from trainer.tracking import Meter, Row, Trackers

REMEDY = "Lower the learning rate, lengthen the warm-up, or inspect the data of this step"


def fit(trainer: Trainer, trackers: Trackers, stop: StopAgreement) -> None:
    """Train up to the last step, from the step after `trainer.progress`. Collective: all ranks must call it.

    Raises:
        TrainingHalted: at a step whose update DeepSpeed skipped because a gradient was not finite, and at a logged
            step whose loss or gradient norm is not finite. A step is logged before it is saved, so no checkpoint of
            such a step exists.
        ReplicasDifferError: at a step of `training.verify_every_steps`, before it is saved.
        DataError: from the prefetch thread, at the step whose batch is invalid.
        Preempted: after the step at which all ranks agreed to stop, once its checkpoint is saved.
    """
    try:
        is_stopped = train(trainer, trackers, stop)
    except TesseraError:  # exiting ends the thread that writes a checkpoint
        trainer.checkpoints.close()
        raise
    trainer.checkpoints.close()
    step = trainer.progress.step
    if is_stopped:
        trainer.checkpoints.refuse_unsaved(step)
        raise stop.preemption_error(step)
    trainer.world.phases.enter("final", step)


def train(trainer: Trainer, trackers: Trackers, stop: StopAgreement) -> bool:
    """Take the steps. Collective: all ranks must call it. A checkpoint may still be being written on return.

    Returns:
        True if training was stopped before the last step.
    """
    config, world, engine, progress = trainer.loaded.config, trainer.world, trainer.engine, trainer.progress
    train_batches, last = trainer.batches.train, trainer.loaded.steps
    meter = start_meter(trainer)
    first_step = progress.step + 1
    if first_step == 1:
        evaluate(0, trainer, meter, trackers)
    for step, batch in enumerate(meter.timed(train_batches.steps(first_step, last)), start=first_step):
        stop.before_step(step)
        world.phases.enter("step", step)
        world.seed_step(step)
        result = engine.train_step(batch, verify_step=step if is_replica_check_due(step, config) else None)
        progress.advance(batch.tokens, batch.samples)
        meter.add(batch.tokens)
        if not result.applied and config.deepspeed.precision != "fp16":  # fp16 skips steps to find its loss scale
            raise TrainingHalted(f"step {step}: a gradient is not finite. {REMEDY}")
        losses: dict[str, float | None] = {}
        is_stopping = stop.stops_after(step)
        is_save_due = is_stopping or trainer.checkpoints.is_due(step)
        if is_save_due or step in (1, last) or step % config.training.log_every_steps == 0:
            row = meter.train_row(step, train_batches.epochs_after(step), result, batch.tokens)
            trackers.log(row)
            halt_on_nonfinite(row, result.applied)
            losses["train"] = row["loss"]
        if step == last or (is_multiple(step, config.evaluation.every_steps) and not is_stopping):
            losses["validation"] = evaluate(step, trainer, meter, trackers)
        if is_save_due:
            world.phases.enter("save", step)
            save(trainer, meter, trackers, losses)
        if is_stopping:
            return True
    return False


def start_meter(trainer: Trainer) -> Meter:
    """Return a meter that measures from now on."""
    return Meter(
        trainer.engine,
        trainer.progress,
        device=trainer.world.device,
        devices=trainer.world.topology.world_size,
        cost=trainer.plan.cost,
        sequence_length=trainer.loaded.config.data.sequence_length,
        attempt=trainer.directory.attempt,
    )


def is_multiple(step: int, every: int | None) -> bool:
    """Return True if `step` is a multiple of `every`; never if `every` is None."""
    return every is not None and step % every == 0


def is_replica_check_due(step: int, config: Config) -> bool:
    """Return True if this step compares replicated weights."""
    every = config.training.verify_every_steps
    return every > 0 and step % every == 0


def evaluate(step: int, trainer: Trainer, meter: Meter, trackers: Trackers) -> float | None:
    """Evaluate and log the loss on the validation data. Collective: all ranks must call it.

    The time does not count as training.

    Returns:
        The loss; None without validation data.
    """
    if trainer.batches.validation is None:
        return None
    trainer.world.phases.enter("evaluate", step)
    start = time.perf_counter()
    evaluation = trainer.engine.evaluate(trainer.batches.validation)
    trackers.log(meter.validation_row(step, evaluation))
    meter.pause(time.perf_counter() - start)
    return evaluation.loss


def save(trainer: Trainer, meter: Meter, trackers: Trackers, losses: dict[str, float | None]) -> None:
    """Save a checkpoint. Collective: all ranks must call it. The time does not count as training."""
    start = time.perf_counter()
    trainer.checkpoints.save(trainer.engine, trainer.progress, losses, trackers=trackers.states())
    meter.pause(time.perf_counter() - start)


def halt_on_nonfinite(row: Row, applied: bool) -> None:
    """Raise if the loss is not finite, or a gradient norm that is not finite was applied.

    Raises:
        TrainingHalted: names the step, the loss and the gradient norm.
    """
    loss, norm = row["loss"], row["grad_norm"]
    if math.isfinite(loss) and (norm is None or math.isfinite(norm) or not applied):
        return
    raise TrainingHalted(f"step {row['step']}: loss {loss}, gradient norm {norm}. {REMEDY}")
