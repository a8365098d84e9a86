"""Values of a DeepSpeed section that only the user can set, requested in one problem."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.config.deepspeed.optimizers import optimizer_keys, scheduler_keys
from trainer.config.deepspeed.resolve import BATCH_KEYS
from trainer.config.deepspeed.section import RESOLVED_AUTOS, OptimizerSection, SchedulerSection
from trainer.errors import Problem

_EXAMPLES: Mapping[str, Any] = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 1,
    "optimizer.params.lr": 3e-4,
    "optimizer.params.muon_lr": 0.02,
    "optimizer.params.adam_lr": 3e-4,
    "optimizer.params.momentum": 0.9,
    "scheduler.params.warmup_num_steps": 100,
    "scheduler.params.decay_num_steps": 100,
    "zero_optimization.stage": 2,
    "zero_optimization.offload_optimizer.device": "cpu",
    "zero_optimization.offload_param.device": "cpu",
}
_OPTIMIZER = {"type": "AdamW", "params": {"lr": 3e-4}}


@dataclass(frozen=True)
class _Gap:
    """A missing value."""

    name: str
    """The missing key, dotted below `deepspeed`, or several."""

    problem: Problem
    """The problem if it is the only gap."""

    values: Mapping[str, Any]
    """Example values, by dotted key."""


def missing_values(section: Mapping[str, Any], autos: Iterable[str] = (), file: str | None = None) -> list[Problem]:
    """Return at most one problem: the values to add to the section.

    Args:
        section: The normalized section, which is not validated yet.
        autos: Dotted keys that are "auto" where only the user can set the value.
        file: The DeepSpeed file that the section comes from, as the configuration names it.
    """
    gaps = [*_batch(section), *_optimizer(section), *_params(section), *map(_auto, autos)]
    if not gaps:
        return []
    values: dict[str, Any] = {}
    for gap in gaps:
        for key, value in gap.values.items():
            _put(values, key.split("."), value)
    remedy = _line(values, file)
    if len(gaps) == 1:
        return [Problem(gaps[0].problem.path, gaps[0].problem.reason, remedy)]
    names = ", ".join(gap.name for gap in gaps)
    return [Problem("deepspeed", f"values that nothing else determines are missing: {names}", remedy)]


def _line(values: Mapping[str, Any], file: str | None) -> str:
    """Return the missing values with examples, ready to be copied."""
    if file is not None:
        return f'For example "deepspeed": {json.dumps({"extends": file, **values})}'
    return f"For example {json.dumps(values)[1:-1]} in the deepspeed section"


def _put(node: dict[str, Any], keys: list[str], value: object) -> None:
    for key in keys[:-1]:
        node = node.setdefault(key, {})
    node[keys[-1]] = value


def _is_open(value: object) -> bool:
    return value is None or value == "auto"


def _batch(section: Mapping[str, Any]) -> Iterator[_Gap]:
    missing = [key for key in BATCH_KEYS if _is_open(section.get(key))]
    if len(missing) < 2:
        return
    names = ", ".join(missing)
    wanted = [key for key in BATCH_KEYS if key in missing][: len(missing) - 1]
    number = "one" if len(missing) == 2 else "two"
    problem = Problem("deepspeed", f"two of the three batch keys are required; missing: {names}")
    yield _Gap(f"{number} of {names}", problem, {key: _EXAMPLES[key] for key in wanted})


def _optimizer(section: Mapping[str, Any]) -> Iterator[_Gap]:
    if _is_open(section.get("optimizer")):
        problem = Problem("deepspeed.optimizer", "required, but missing")
        yield _Gap("optimizer", problem, {"optimizer": _OPTIMIZER})


def _params(section: Mapping[str, Any]) -> Iterator[_Gap]:
    """Yield "auto" arguments of the optimizer and the scheduler that nothing resolves.

    Arguments that their classes do not have are reported by `_param_problems`.
    """
    for name in ("optimizer", "scheduler"):
        part = section.get(name)
        params = part.get("params") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or not isinstance(params, Mapping) or not isinstance(part.get("type"), str):
            continue
        autos = [key for key in params if params[key] == "auto" and f"{name}.params.{key}" not in RESOLVED_AUTOS]
        known = _known(name, part["type"], params) if autos else frozenset()
        yield from (_auto(f"{name}.params.{key}") for key in autos if key in known)


def _known(name: str, class_name: str, params: Mapping[str, Any]) -> frozenset[str]:
    if name == "scheduler":
        return scheduler_keys(SchedulerSection(type=class_name)) or frozenset()
    chosen = {"torch_adam": True} if params.get("torch_adam") is True else {}
    return optimizer_keys(OptimizerSection(type=class_name, params=chosen), offload=False) or frozenset()


def _auto(key: str) -> _Gap:
    problem = Problem(f"deepspeed.{key}", '"auto" cannot be resolved, because nothing else determines this value')
    return _Gap(f'{key} (got "auto")', problem, {key: _EXAMPLES.get(key, "...")})
