"""Rules about the length of the training and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.config.deepspeed import DeepSpeedSection, scheduler_problems
from trainer.config.deepspeed.section import OptimizerSection
from trainer.config.rules.registry import TrainingLength, rule_reading
from trainer.config.schema import TrainingSection
from trainer.errors import Problem


@rule_reading("deepspeed.scheduler")
def scheduler_valid(deepspeed: DeepSpeedSection) -> Iterator[Problem]:
    yield from scheduler_problems(deepspeed)


@rule_reading("deepspeed.scheduler", "deepspeed.optimizer")
def auto_warmup_max_lr_requires_lr(deepspeed: DeepSpeedSection) -> Iterator[Problem]:
    scheduler, optimizer = deepspeed.scheduler, deepspeed.optimizer
    if scheduler is None or optimizer is None or "lr" in optimizer.params:
        return
    if scheduler.params.get("warmup_max_lr") == "auto":
        yield Problem(
            "deepspeed.scheduler.params.warmup_max_lr",
            '"auto" is optimizer.params.lr, which is missing',
            "Set one of them",
        )


@rule_reading("training.max_steps", "training.epochs")
def training_length_is_steps_or_epochs(training: TrainingSection) -> Iterator[Problem]:
    steps, epochs = training.max_steps, training.epochs
    if steps is None and epochs is None:
        yield Problem("training.max_steps", "required, but missing", "Set it, or training.epochs")
    elif steps is not None and epochs is not None:
        reason = f"must not be set together with training.max_steps = {steps} (got {epochs:g})"
        yield Problem("training.epochs", reason, "Remove one of them, for example with --set training.epochs=null")


@rule_reading("deepspeed.scheduler")
def one_cycle_covers_all_steps(deepspeed: DeepSpeedSection, length: TrainingLength) -> Iterator[Problem]:
    scheduler = deepspeed.scheduler
    total = scheduler.params.get("total_steps") if scheduler and scheduler.type == "OneCycleLR" else None
    if isinstance(total, int) and length.steps is not None and total < length.steps:
        reason = f"must be at least {length.description}, because OneCycleLR ends there (got {total})"
        yield Problem("deepspeed.scheduler.params.total_steps", reason)


@rule_reading("deepspeed.scheduler", "deepspeed.optimizer")
def wsd_phases_fit(deepspeed: DeepSpeedSection, length: TrainingLength) -> Iterator[Problem]:
    scheduler, optimizer = deepspeed.scheduler, deepspeed.optimizer
    if scheduler is None or scheduler.type != "WSD" or optimizer is None:
        return
    key, params = "deepspeed.scheduler.params", scheduler.params
    total = params.get("total_num_steps")
    total = length.steps if total == "auto" else total
    warmup, decay = params.get("warmup_num_steps", 0), params.get("decay_num_steps")
    if all(isinstance(steps, int) for steps in (total, warmup, decay)) and warmup + decay > total:
        reason = f"must be at most total_num_steps - warmup_num_steps = {total - warmup} (got {decay})"
        yield Problem(f"{key}.decay_num_steps", reason)
    peaks = _peak_rates(params, optimizer)
    if not peaks:
        return
    source = min(peaks, key=peaks.__getitem__)
    for name in ("warmup_min_lr", "decay_min_lr"):
        rate = params.get(name)
        if isinstance(rate, int | float) and rate > peaks[source]:
            yield Problem(f"{key}.{name}", f"must be at most the peak rate, {source} = {peaks[source]} (got {rate})")


def _peak_rates(params: Mapping[str, Any], optimizer: OptimizerSection) -> dict[str, float]:
    """Return the peak rates of a WSD schedule, by the key that sets them.

    `warmup_max_lr` applies to all parameter groups; without it each group has its own rate.
    """
    peak = params.get("warmup_max_lr")
    if peak is not None and peak != "auto":
        rates = {"warmup_max_lr": peak}
    else:
        names = ("muon_lr", "adam_lr") if optimizer.type.lower() == "muon" and peak is None else ("lr",)
        sources = [name if name in optimizer.params else "lr" for name in names]
        rates = {f"optimizer.params.{name}": optimizer.params.get(name) for name in sources}
    return {key: rate for key, rate in rates.items() if isinstance(rate, int | float)}
