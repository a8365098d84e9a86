"""Rules about the learning rate's schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.config.deepspeed import scheduler_problems
from trainer.config.deepspeed.section import OptimizerSection
from trainer.config.rules.registry import Draft, rule
from trainer.errors import Problem


@rule("deepspeed.scheduler")
def scheduler_valid(draft: Draft) -> Iterator[Problem]:
    assert draft.deepspeed is not None
    yield from scheduler_problems(draft.deepspeed)


@rule("deepspeed.scheduler", "deepspeed.optimizer")
def auto_warmup_max_lr_requires_lr(draft: Draft) -> Iterator[Problem]:
    assert draft.deepspeed is not None
    if draft.deepspeed.scheduler is None or draft.deepspeed.optimizer is None:
        return
    wanted = draft.deepspeed.scheduler.params.get("warmup_max_lr") == "auto"
    if wanted and "lr" not in draft.deepspeed.optimizer.params:
        yield Problem(
            "deepspeed.scheduler.params.warmup_max_lr",
            '"auto" takes optimizer.params.lr, which is missing',
            "Give one of the two",
        )


@rule("training.max_steps", "training.epochs")
def training_length_is_steps_or_epochs(draft: Draft) -> Iterator[Problem]:
    assert draft.training is not None
    steps, epochs = draft.training.max_steps, draft.training.epochs
    if steps is None and epochs is None:
        yield Problem("training.max_steps", "required, but missing", "Give it, or training.epochs")
    elif steps is not None and epochs is not None:
        reason = f"{epochs:g}, and training.max_steps is {steps}"
        yield Problem("training.epochs", reason, "Leave one of the two out; --set training.epochs=null does")


@rule("deepspeed.scheduler", "training.max_steps")
def one_cycle_covers_all_steps(draft: Draft) -> Iterator[Problem]:
    assert draft.deepspeed is not None
    assert draft.training is not None
    section = draft.deepspeed.scheduler
    total = section.params.get("total_steps") if section and section.type == "OneCycleLR" else None
    if isinstance(total, int) and draft.steps is not None and total < draft.steps:
        yield Problem(
            "deepspeed.scheduler.params.total_steps",
            f"{total} is less than {draft.steps_in_words}; OneCycleLR takes no step beyond it",
            "Raise it",
        )


@rule("deepspeed.scheduler", "deepspeed.optimizer", "training.max_steps")
def wsd_phases_fit(draft: Draft) -> Iterator[Problem]:
    assert draft.deepspeed is not None
    assert draft.training is not None
    section, optimizer = draft.deepspeed.scheduler, draft.deepspeed.optimizer
    if section is None or section.type != "WSD" or optimizer is None:
        return
    path, params = "deepspeed.scheduler.params", section.params
    total = params.get("total_num_steps")
    total = draft.steps if total == "auto" else total
    warmup, decay = params.get("warmup_num_steps", 0), params.get("decay_num_steps")
    if all(isinstance(value, int) for value in (total, warmup, decay)) and warmup + decay > total:
        yield Problem(
            f"{path}.decay_num_steps",
            f"{decay} and warmup_num_steps = {warmup} are more than total_num_steps = {total}",
            "Shorten one of them",
        )
    peaks = _peaks(params, optimizer)
    if not peaks:
        return
    source = min(peaks, key=peaks.__getitem__)
    for key in ("warmup_min_lr", "decay_min_lr"):
        minimum = params.get(key)
        if isinstance(minimum, int | float) and minimum > peaks[source]:
            problem = f"{minimum} is higher than the highest rate, {peaks[source]} ({source})"
            yield Problem(f"{path}.{key}", problem, "Lower it")


def _peaks(params: Mapping[str, Any], optimizer: OptimizerSection) -> dict[str, float]:
    """The highest rates of a `WSD`, by the key that sets them: one of all groups, or without it each group's own."""
    peak = params.get("warmup_max_lr")
    if peak is not None and peak != "auto":
        rates = {"warmup_max_lr": peak}
    else:
        keys = ("muon_lr", "adam_lr") if optimizer.type.lower() == "muon" and peak is None else ("lr",)
        sources = [key if key in optimizer.params else "lr" for key in keys]
        rates = {f"optimizer.params.{key}": optimizer.params.get(key) for key in sources}
    return {key: value for key, value in rates.items() if isinstance(value, int | float)}
