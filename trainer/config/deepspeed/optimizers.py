"""Optimizers and schedulers: their keys are compared with the arguments of their classes, and tried on a dummy."""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from deepspeed.runtime import lr_schedules

from trainer.config.deepspeed.section import (
    PER_GROUP_ARGUMENTS,
    DeepSpeedSection,
    OptimizerSection,
    SchedulerSection,
)
from trainer.config.deepspeed.wsd import DECAYS, WSD
from trainer.config.hints import hint
from trainer.errors import Problem, first_line, suggest

_TORCH_OPTIMIZERS = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
}
ELEMENTWISE = frozenset(
    ("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
)
"""Optimizers that update each element independently, so that ZeRO's flat partitions compute the same step."""

_MUON_KEYS = frozenset(("lr", "momentum", "weight_decay", "ns_method", "betas", "eps", "muon_lr", "adam_lr"))
_DEEPSPEED_NAMES = {
    "adam": "Adam",
    "adamw": "AdamW",
    "adagrad": "Adagrad",
    "lion": "Lion",
    "muon": "Muon",
}
_MUP = {"muadam": "Adam", "muadamw": "AdamW", "musgd": "SGD"}


def _arguments(cls: type) -> dict[str, inspect.Parameter]:
    parameters = dict(inspect.signature(cls.__init__).parameters)  # type: ignore[misc]
    return {n: p for n, p in parameters.items() if n not in ("self", "params", "model_params", "optimizer")}


def optimizer_keys(section: OptimizerSection, *, offload: bool) -> frozenset[str] | None:
    """Return the keys of `params` for an optimizer; None for one that does not exist."""
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

    name = section.type.lower()
    if name in ("adam", "adamw"):
        switches = {"torch_adam", "adam_w_mode"}
        if section.params.get("torch_adam") is True:
            return frozenset(_arguments(torch.optim.AdamW)) | switches
        cls = DeepSpeedCPUAdam if offload else FusedAdam
        return (frozenset(_arguments(cls)) | switches) - {"adamw_mode"}
    if name == "muon":
        return _MUON_KEYS | {"adam_w_mode", "torch_adam"}
    if name == "lion":
        return frozenset(_arguments(DeepSpeedCPULion if offload else FusedLion))
    if name == "adagrad":
        return frozenset(_arguments(DeepSpeedCPUAdagrad if offload else torch.optim.Adagrad))
    if name in _MUP:
        return frozenset(_arguments(_TORCH_OPTIMIZERS[_MUP[name]]))
    torch_optimizer = _TORCH_OPTIMIZERS.get(section.type)
    return frozenset(_arguments(torch_optimizer)) if torch_optimizer else None


def weight_decay(resolved: Mapping[str, Any]) -> float:
    """Return the optimizer's weight decay under a resolved configuration; the default of its class if it is unset."""
    optimizer = resolved["optimizer"]
    params = optimizer.get("params", {})
    if "weight_decay" in params:
        return float(params["weight_decay"])
    name = optimizer["type"].lower()
    cls = None if name in _DEEPSPEED_NAMES else _TORCH_OPTIMIZERS.get(_MUP.get(name, optimizer["type"]))
    if name in ("adam", "adamw") and params.get("torch_adam"):
        cls = torch.optim.AdamW if name == "adamw" or params.get("adam_w_mode", True) else torch.optim.Adam
    default = None if cls is None else _arguments(cls).get("weight_decay")
    return 0.0 if default is None else float(default.default)


def _unknown(path: str, what: str, value: str, known: Iterable[str]) -> Problem:
    candidates = sorted(known)
    suggestion = suggest(value, candidates)
    return Problem(
        path, f"unknown {what} '{value}'{suggestion}", "" if suggestion else f"Known: {', '.join(candidates)}"
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_int_of_at_least(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


Checks = Mapping[str, tuple[Callable[[Any], bool], str]]

_PARAM_CHECKS: Checks = {
    "lr": (lambda v: _is_number(v) and v >= 0, "a number >= 0"),
    "muon_lr": (lambda v: _is_number(v) and v >= 0, "a number >= 0"),
    "adam_lr": (lambda v: _is_number(v) and v >= 0, "a number >= 0"),
    "eps": (lambda v: _is_number(v) and v >= 0, "a number >= 0"),
    "weight_decay": (lambda v: _is_number(v) and v >= 0, "a number >= 0"),
    "momentum": (lambda v: _is_number(v) and 0 <= v < 1, "a number in [0, 1)"),
    "betas": (
        lambda v: isinstance(v, list) and len(v) == 2 and all(_is_number(b) and 0 <= b < 1 for b in v),
        "two numbers in [0, 1)",
    ),
    "warmup_num_steps": (lambda v: _is_int_of_at_least(v, 1), "a whole number >= 1"),
    "total_num_steps": (lambda v: _is_int_of_at_least(v, 1), "a whole number >= 1"),
    "warmup_type": (lambda v: v in ("log", "linear"), "'log' or 'linear'"),
    "warmup_min_lr": (lambda v: _is_number(v) and v >= 0, "a number >= 0"),
    "warmup_max_lr": (lambda v: _is_number(v) and v >= 0, "a number >= 0"),
    "cos_min_ratio": (lambda v: _is_number(v) and 0 <= v <= 1, "a number in [0, 1]"),
    "warmup_min_ratio": (lambda v: _is_number(v) and 0 <= v <= 1, "a number in [0, 1]"),
}


_WSD_CHECKS: Checks = {
    **_PARAM_CHECKS,
    "warmup_num_steps": (lambda v: _is_int_of_at_least(v, 0), "a whole number >= 0"),
    "decay_num_steps": (lambda v: _is_int_of_at_least(v, 0), "a whole number >= 0"),
    "decay_min_lr": (lambda v: _is_number(v) and v >= 0, "a number >= 0"),
    "decay_type": (lambda v: isinstance(v, str) and v in DECAYS, "'linear', 'cosine' or '1-sqrt'"),
}


def _param_problems(
    where: str, params: Mapping[str, Any], known: frozenset[str], checks: Checks = _PARAM_CHECKS
) -> Iterator[Problem]:
    for key, value in params.items():
        path = f"deepspeed.{where}.params.{key}"
        if key == "max_grad_norm":
            yield Problem(path, "not an argument of an optimizer in DeepSpeed", "Set deepspeed.gradient_clipping")
        elif key not in known and (hinted := hint(path)):
            yield hinted
        elif key not in known:
            suggestion = suggest(key, known)
            yield Problem(path, f"unknown key{suggestion}", "" if suggestion else f"Known: {', '.join(sorted(known))}")
        elif value == "auto":
            continue  # resolved, or reported by `missing_values`
        elif where == "scheduler" and key in PER_GROUP_ARGUMENTS and isinstance(value, list):
            remedy = "Set training.learning_rate_scales for weights with other rates"
            yield Problem(path, f"must be one number, for all parameter groups (got {value!r})", remedy)
        elif key in checks and not checks[key][0](value):
            yield Problem(path, f"expected {checks[key][1]}, got {value!r}")


def optimizer_problems(section: DeepSpeedSection) -> Iterator[Problem]:
    """Yield the problems of the optimizer: unknown, with unknown or invalid parameters, or not supported."""
    path = "deepspeed.optimizer"
    if section.optimizer is None:
        return  # reported by `missing_values`
    name = section.optimizer.type
    if name.lower() == "lamb":
        reason = "DeepSpeed 0.19 supports Lamb only with fp16 at ZeRO stage 0, where its loss scaling is not undone"
        yield Problem(f"{path}.type", reason, "Use AdamW")
        return
    known = optimizer_keys(section.optimizer, offload=section.offload_device != "none")
    if known is None:
        names = [*_DEEPSPEED_NAMES.values(), *(n for n in _TORCH_OPTIMIZERS if n.lower() not in _DEEPSPEED_NAMES)]
        yield _unknown(f"{path}.type", "optimizer", name, names)
        return
    if name in ("LBFGS", "SparseAdam"):
        reason = "evaluates the loss several times a step" if name == "LBFGS" else "requires sparse gradients"
        yield Problem(f"{path}.type", f"{name} {reason}, which is not supported", "Choose another optimizer")
    if name.lower() in _MUP and importlib.util.find_spec("mup") is None:
        yield Problem(
            f"{path}.type", f"{name} requires the package 'mup', which is not installed", "Run pip install mup"
        )
    zero = section.zero_optimization
    if name.lower() == "muon" and section.zero_stage == 3 and getattr(zero, "reduce_scatter", None) is not False:
        yield Problem(
            "deepspeed.zero_optimization.reduce_scatter",
            "must be false for Muon at ZeRO 3, which requires full gradients",
            "Set it to false",
        )
    if name == "Adafactor" and section.zero_stage > 0:
        yield Problem(
            f"{path}.type",
            "Adafactor factors its second moment over rows and columns, and ZeRO's flat partitions would change the "
            "algorithm",
            "Set zero_optimization.stage to 0, or choose another optimizer",
        )
    problems = list(_param_problems("optimizer", section.optimizer.params, known))
    yield from problems
    refusal = None if problems else _optimizer_refusal(section.optimizer)
    if refusal:
        yield Problem(f"{path}.params", refusal)


def _trial(call: Callable[[], object]) -> str | None:
    """Return the cause of a failing call in one line; None if it succeeds."""
    try:
        call()
    except Exception as error:  # classes check their arguments with different exceptions, or fail in arithmetic
        return first_line(error)
    return None


def _optimizer_refusal(section: OptimizerSection) -> str | None:
    """Return why the optimizer's class refuses its parameters; None if it accepts them.

    DeepSpeed's kernels are not loaded for this, so that its optimizers are tried with PyTorch's class.
    """
    name, params = section.type.lower(), {k: v for k, v in section.params.items() if v != "auto"}
    if name in ("adam", "adamw") and not params.get("torch_adam"):
        return "DeepSpeed's Adam does not support amsgrad" if params.get("amsgrad") else None
    cls = torch.optim.AdamW if name in ("adam", "adamw") else _TORCH_OPTIMIZERS.get(section.type)
    params = {k: v for k, v in params.items() if k not in ("torch_adam", "adam_w_mode")}
    known = cls is not None and params.keys() <= _arguments(cls).keys()
    if cls is None or not known:
        return None
    return _trial(lambda: cls([torch.nn.Parameter(torch.zeros(2, 2))], **params))


def _scheduler_refusal(cls: type, section: SchedulerSection) -> str | None:
    params = {
        k: 1 if k in ("total_num_steps", "warmup_max_lr") and v == "auto" else v for k, v in section.params.items()
    }
    params = {k: v for k, v in params.items() if v != "auto"}

    return _trial(lambda: _walk(cls, params, 1e-3, 3))


def _walk(cls: type, params: Mapping[str, Any], rate: float, steps: int) -> list[float]:
    """Return the rates of the first steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    schedule: Any = cls(optimizer, **params)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the optimizer does not step in between
        for _ in range(steps):
            rates.append(float(optimizer.param_groups[0]["lr"]))
            schedule.step()
    return rates


def first_learning_rates(resolved: Mapping[str, Any], steps: int) -> list[float]:
    """Return the learning rates of the first steps under a resolved configuration; of Muon, that of matrices."""
    optimizer, section = resolved["optimizer"], resolved.get("scheduler")
    params = optimizer.get("params", {})
    rate = float(params.get("muon_lr", params.get("lr", 1e-3)))
    if section is None:
        return [rate] * steps
    cls = _scheduler_class(section["type"])
    return [rate] * steps if cls is None else _walk(cls, section["params"], rate, steps)


def _scheduler_class(name: str) -> type | None:
    if name == WSD.__name__:
        return WSD
    if name in lr_schedules.VALID_LR_SCHEDULES:
        return getattr(lr_schedules, name)  # type: ignore[no-any-return]
    cls = getattr(torch.optim.lr_scheduler, name, None)
    base = torch.optim.lr_scheduler.LRScheduler
    # JSON cannot express a scheduler that takes other schedulers or functions; one that steps on a metric would need
    # the validation loss within the optimizer step.
    unfit = ("LRScheduler", "LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler", "ReduceLROnPlateau")
    return cls if isinstance(cls, type) and issubclass(cls, base) and name not in unfit else None


def scheduler_keys(section: SchedulerSection) -> frozenset[str] | None:
    """Return the keys of `params` for a scheduler; None for one that does not exist."""
    cls = _scheduler_class(section.type)
    return None if cls is None else frozenset(_arguments(cls)) - {"last_batch_iteration"}


def scheduler_problems(section: DeepSpeedSection) -> Iterator[Problem]:
    """Yield the problems of the scheduler: unknown, or with unknown, invalid or missing parameters."""
    if section.scheduler is None:
        return
    path = "deepspeed.scheduler"
    cls, known = _scheduler_class(section.scheduler.type), scheduler_keys(section.scheduler)
    if cls is None or known is None:
        names = [*lr_schedules.VALID_LR_SCHEDULES, WSD.__name__]
        yield _unknown(f"{path}.type", "scheduler", section.scheduler.type, names)
        return
    arguments = _arguments(cls)
    checks = _WSD_CHECKS if cls is WSD else _PARAM_CHECKS
    problems = list(_param_problems("scheduler", section.scheduler.params, known, checks))
    for name, parameter in arguments.items():
        if parameter.default is inspect.Parameter.empty and name not in section.scheduler.params:
            problems.append(Problem(f"{path}.params.{name}", "required, but missing"))
    yield from problems
    refusal = None if problems else _scheduler_refusal(cls, section.scheduler)
    if refusal:
        yield Problem(f"{path}.params", refusal)
