"""Counters and loss scale of DeepSpeed's engines, as saved in checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from trainer.compat.deepspeed.interfaces import DeepSpeedEngine

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
"""Optimizer steps, samples, and steps skipped because a gradient was not finite: attributes of the engine."""


def read_counters(engine: DeepSpeedEngine) -> dict[str, int]:
    """Read the counts of steps, samples, and steps skipped because a gradient was not finite."""
    return {name: int(getattr(engine, name)) for name in COUNTERS}


def restore_counters(engine: DeepSpeedEngine, counters: Mapping[str, int]) -> None:
    """Set the counters, and the learning rate schedule that depends on them."""
    for name in COUNTERS:
        setattr(engine, name, int(counters[name]))
    # DeepSpeed finds the last micro-batch of a step by this count. It is computed rather than saved, because the
    # attempt that saved the checkpoint may have had another number of micro-batches per step.
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    _replay_schedule(engine, counters["global_steps"] - counters["skipped_steps"])


def _replay_schedule(engine: DeepSpeedEngine, steps: int) -> None:
    """Step the schedule as often as the optimizer was stepped.

    A schedule of another length then has the rates of a run that had this length from the start.
    """
    if engine.lr_scheduler is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch expects a step of the optimizer before each
        for _ in range(steps):
            engine.lr_scheduler.step()


def read_loss_scale(engine: DeepSpeedEngine) -> dict[str, float | bool]:
    """State of the dynamic loss scale of fp16; empty in other precisions."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if not getattr(scaler, "dynamic", False):
        return {}
    return {name: value for name, value in vars(scaler).items() if isinstance(value, int | float)}


def restore_loss_scale(engine: DeepSpeedEngine, state: Mapping[str, float | bool]) -> None:
    """Set the state of the dynamic loss scale, restricted to the attributes of this version of DeepSpeed."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if getattr(scaler, "dynamic", False):
        vars(scaler).update({name: value for name, value in state.items() if name in vars(scaler)})
