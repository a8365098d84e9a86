"""The `deepspeed` section: a standard DeepSpeed configuration, checked at every depth, and the only writer of
what DeepSpeed receives.

DeepSpeed itself ignores an unknown top-level key and drops a nested "auto" in silence. Here its own pydantic
classes are mirrored with our strictness, every key of an optimizer or scheduler is compared with the
arguments of its class, and every "auto" is resolved exactly or refused.
"""

from __future__ import annotations

import enum
import importlib.util
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import torch
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel, BeforeValidator, Field, create_model

from trainer.config.section import Section
from trainer.errors import Problem

Auto = Literal["auto"]


def _integral(value: object) -> object:
    """5e8 is how people write bucket sizes; JSON reads it as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_integral)]
Count = Annotated[int, BeforeValidator(_integral), Field(ge=1)]


_LEFT_OUT = ("zero_optimization.legacy_stage1", "zero_optimization.elastic_checkpoint")
"""Keys that DeepSpeed's classes still have and that do nothing, or nothing here; see `REFUSED`."""


def _strict(annotation: Any, path: str, auto: frozenset[str]) -> Any:
    """The type of a DeepSpeed field, without DeepSpeed's silent conversions."""
    if get_origin(annotation) in (Union, types.UnionType):
        return Union[tuple(_strict(member, path, auto) for member in get_args(annotation))]  # noqa: UP007
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return mirror(annotation, path, auto)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return Literal[tuple(dict.fromkeys(member.value for member in annotation))]
    return {int: Integer, Path: str}.get(annotation, annotation)


def mirror(source: type[BaseModel], path: str, auto: frozenset[str] = frozenset()) -> type[Section]:
    """A strict section with the keys, types and bounds of DeepSpeed's own class `source`.

    `auto` holds the dotted paths at which "auto" may stand. Deprecated keys are left out, and those of `_LEFT_OUT`.
    """
    fields: dict[str, Any] = {}
    for name, field in source.model_fields.items():
        extra = field.json_schema_extra
        key = field.alias or name
        if (isinstance(extra, Mapping) and extra.get("deprecated")) or f"{path}.{key}" in _LEFT_OUT:
            continue
        kind = _strict(field.annotation, f"{path}.{key}", auto)
        if field.metadata:
            kind = Annotated[(kind, *field.metadata)]
        if f"{path}.{key}" in auto:
            kind = kind | Auto
        fields[key] = (kind | None, None)
    return create_model(source.__name__, __base__=Section, **fields)


RESOLVED_AUTOS: Mapping[str, str] = {
    "train_batch_size": "micro-batch x accumulation x data ranks",
    "train_micro_batch_size_per_gpu": "train batch / accumulation / data ranks",
    "gradient_accumulation_steps": "train batch / micro-batch / data ranks",
    "gradient_clipping": "1.0",
    "zero_optimization.reduce_bucket_size": "hidden size squared",
    "zero_optimization.stage3_prefetch_bucket_size": "0.9 x hidden size squared",
    "zero_optimization.stage3_param_persistence_threshold": "10 x hidden size",
    "optimizer.params.betas": "[0.9, 0.999]",
    "optimizer.params.eps": "1e-8",
    "optimizer.params.weight_decay": "0.0",
    "scheduler.params.warmup_min_lr": "0.0",
    "scheduler.params.warmup_max_lr": "optimizer.params.lr",
    "scheduler.params.total_num_steps": "training.max_steps",
}
"""Where "auto" may stand and what it becomes: the meaning that Hugging Face's Trainer gives it."""

_AUTO = frozenset(RESOLVED_AUTOS)
_ZeroSection = mirror(DeepSpeedZeroConfig, "zero_optimization", _AUTO)
_Dtype = Literal["fp32", "fp16", "bf16"]


class OptimizerSection(Section):
    type: str
    """Adam, AdamW, Adagrad, Lamb, Lion, Muon (DeepSpeed's), or any of `torch.optim` by name."""

    params: dict[str, Any] = {}
    """Arguments of the optimizer's class."""

    legacy_fusion: bool | None = None


class SchedulerSection(Section):
    type: str
    """LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR, or one of `torch.optim.lr_scheduler`."""

    params: dict[str, Any] = {}
    """Arguments of the scheduler's class."""


class TimersSection(Section):
    throughput: mirror(DeepSpeedThroughputTimerConfig, "timers.throughput") | None = None  # type: ignore[valid-type]


class FlopsProfilerSection(Section):
    """Prints a per-module profile of one step; keys as in DeepSpeed."""

    enabled: bool = False
    recompute_fwd_factor: float = 0.0
    profile_step: Count = 1
    module_depth: Integer = -1
    top_modules: Count = 1
    detailed: bool = True
    output_file: str | None = None


class DataTypesSection(Section):
    grad_accum_dtype: _Dtype | None = None
    param_dtype: _Dtype | None = None
    buffer_dtype: _Dtype | None = None
    keep_in_fp32_modules: Auto | list[str] | None = None


class AioSection(Section):
    """How DeepSpeed reads and writes NVMe."""

    block_size: Count | None = None
    queue_depth: Count | None = None
    intra_op_parallelism: Count | None = None
    single_submit: bool | None = None
    overlap_events: bool | None = None
    use_gds: bool | None = None


class DeepSpeedSection(Section):
    """A standard DeepSpeed configuration, inline or the path of a file that holds one."""

    train_batch_size: Count | Auto | None = None
    """Samples of one optimizer step, over all data ranks and micro-batches. Two of the three batch keys
    must be given."""

    train_micro_batch_size_per_gpu: Count | Auto | None = None
    """Samples that one data rank pushes through the model at once."""

    gradient_accumulation_steps: Count | Auto | None = None
    """Micro-batches of one optimizer step on one data rank."""

    optimizer: OptimizerSection | None = None
    scheduler: SchedulerSection | None = None

    gradient_clipping: Annotated[float, Field(ge=0)] | Auto | None = None
    """Largest global gradient norm; 0 turns clipping off. Default: 1.0."""

    bf16: mirror(DeepSpeedBF16Config, "bf16") | None = None  # type: ignore[valid-type]
    fp16: mirror(DeepSpeedFP16Config, "fp16") | None = None  # type: ignore[valid-type]
    zero_optimization: _ZeroSection | None = None  # type: ignore[valid-type]
    communication_data_type: _Dtype | None = None
    prescale_gradients: bool | None = None
    gradient_predivide_factor: Annotated[float, Field(gt=0)] | None = None
    zero_allow_untested_optimizer: bool | None = None
    data_types: DataTypesSection | None = None
    aio: AioSection | None = None
    disable_python_gc: bool | None = None
    steps_per_print: Count | None = None
    """DeepSpeed's own progress lines. Default: none, the console has ours."""

    wall_clock_breakdown: bool | None = None
    memory_breakdown: bool | None = None
    dump_state: bool | None = None
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = None
    """What DeepSpeed itself may print. Default: warning."""

    timers: TimersSection | None = None
    comms_logger: mirror(CommsLoggerConfig, "comms_logger") | None = None  # type: ignore[valid-type]
    flops_profiler: FlopsProfilerSection | None = None

    @property
    def zero_stage(self) -> int:
        return int(getattr(self.zero_optimization, "stage", None) or 0)

    @property
    def offload_device(self) -> str:
        """Where the optimizer state lives when not on the accelerator: `none`, `cpu` or `nvme`."""
        offload = getattr(self.zero_optimization, "offload_optimizer", None)
        return str(getattr(offload, "device", None) or "none")

    @property
    def precision(self) -> Literal["fp32", "bf16", "fp16"]:
        if self.bf16 is not None and self.bf16.enabled:
            return "bf16"
        return "fp16" if self.fp16 is not None and self.fp16.enabled else "fp32"

    @property
    def clipping(self) -> float:
        return 1.0 if self.gradient_clipping in (None, "auto") else float(self.gradient_clipping)


_OURS = "Remove it"
REFUSED: Mapping[str, tuple[str, str]] = {
    "tensor_parallel": ("tensor parallelism is ours here", "Set parallel.tensor"),
    "pipeline": ("pipeline parallelism is ours here", "Set parallel.pipeline"),
    "expert_parallel": ("DeepSpeed's expert parallelism is not used here", _OURS),
    "sequence_parallel_size": ("DeepSpeed's Ulysses is not used here", _OURS),
    "seq_parallel_communication_data_type": ("DeepSpeed's Ulysses is not used here", _OURS),
    "use_data_before_expert_parallelism": ("DeepSpeed's expert parallelism is not used here", _OURS),
    "wandb": ("tracking is ours here", "Set tracking.wandb"),
    "tensorboard": ("tracking is ours here", _OURS),
    "csv_monitor": ("metrics.jsonl in the run directory is always written", _OURS),
    "comet": ("tracking is ours here", _OURS),
    "data_efficiency": ("the data pipeline is ours here", "Use the data section"),
    "dataloader_drop_last": ("the data pipeline is ours here", "Use the data section"),
    "checkpoint": ("DeepSpeed's own checkpoints are not used here", _OURS),
    "datastates_ckpt": ("DeepSpeed's own checkpoints are not used here", _OURS),
    "activation_checkpointing": (
        "DeepSpeed's activation checkpointing acts only on models that call it, and Hugging Face's do not",
        "Set model.activation_checkpointing",
    ),
    "autotuning": ("DeepSpeed's autotuner starts other programs than this one", _OURS),
    "compile": ("DeepCompile is not driven from here", _OURS),
    "hybrid_engine": ("it serves reinforcement learning, not training", _OURS),
    "weight_quantization": ("it serves inference, not training", _OURS),
    "torch_autocast": ("mixed precision is bf16's here", "Set bf16.enabled"),
    "managed_gradient_accumulation": ("the training step is ours here and always managed", _OURS),
    "gradient_allreduce_op": ("the loss is weighted by tokens over the global batch; gradients are averaged", _OURS),
    "disable_allgather": ("DeepSpeed reads it and does nothing", "Use zero_optimization.allgather_partitions"),
    "vocabulary_size": ("DeepSpeed only prints a warning about it", _OURS),
    "zero_force_ds_cpu_optimizer": ("it concerns optimizers made outside DeepSpeed, and none is", _OURS),
    "bfloat16": ("an old spelling", "Write bf16"),
    **{key: (message.rstrip(), "") for key, message in deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS.items()},
    **{
        f"zero_optimization.{key}": (message.rstrip(), "")
        for key, message in deepspeed_config._REMOVED_ZERO_CONFIG_KEYS.items()
    },
    **{
        f"zero_optimization.{name}": ("deprecated in DeepSpeed", f"Use {field.json_schema_extra['new_param']}")
        for name, field in DeepSpeedZeroConfig.model_fields.items()
        if isinstance(field.json_schema_extra, Mapping) and field.json_schema_extra.get("deprecated")
    },
    "zero_optimization.legacy_stage1": ("removed from DeepSpeed", _OURS),
    "zero_optimization.elastic_checkpoint": ("DeepSpeed's own checkpoints are not used here", _OURS),
}
"""Keys of DeepSpeed that are refused here, dotted below `deepspeed`: (reason, remedy)."""


# --- optimizers and schedulers ---------------------------------------------------------------------------------

_TORCH_OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}
_ELEMENTWISE = frozenset(
    ("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
)
"""Each element's update depends on that element only, so ZeRO's flat slices compute the same step."""

_MUON_KEYS = frozenset(("lr", "momentum", "weight_decay", "ns_method", "betas", "eps", "muon_lr", "adam_lr"))
_DEEPSPEED_NAMES = {
    "adam": "Adam",
    "adamw": "AdamW",
    "adagrad": "Adagrad",
    "lamb": "Lamb",
    "lion": "Lion",
    "muon": "Muon",
}
_MUP = {"muadam": "Adam", "muadamw": "AdamW", "musgd": "SGD"}


def _arguments(kind: type) -> dict[str, inspect.Parameter]:
    parameters = dict(inspect.signature(kind.__init__).parameters)  # type: ignore[misc]
    return {n: p for n, p in parameters.items() if n not in ("self", "params", "model_params", "optimizer")}


def optimizer_keys(section: OptimizerSection, offload: bool) -> frozenset[str] | None:
    """The keys that `params` may hold for this optimizer; None for an optimizer that does not exist."""
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lamb import FusedLamb
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

    name = section.type.lower()
    if name in ("adam", "adamw"):
        switches = {"torch_adam", "adam_w_mode"}
        if section.params.get("torch_adam") is True:
            return frozenset(_arguments(torch.optim.AdamW)) | switches
        kind = DeepSpeedCPUAdam if offload else FusedAdam
        return (frozenset(_arguments(kind)) | switches) - {"adamw_mode"}
    if name == "muon":
        return _MUON_KEYS | {"adam_w_mode", "torch_adam"}
    if name == "lamb":
        return frozenset(_arguments(FusedLamb)) - {"max_grad_norm"}
    if name == "lion":
        return frozenset(_arguments(DeepSpeedCPULion if offload else FusedLion))
    if name == "adagrad":
        return frozenset(_arguments(DeepSpeedCPUAdagrad if offload else torch.optim.Adagrad))
    if name in _MUP:
        return frozenset(_arguments(_TORCH_OPTIMIZERS[_MUP[name]]))
    found = _TORCH_OPTIMIZERS.get(section.type)
    return frozenset(_arguments(found)) if found else None


def _unknown(path: str, what: str, value: str, known: Iterator[str] | frozenset[str] | list[str]) -> Problem:
    candidates = sorted(known)
    near = get_close_matches(value, candidates, n=1) or get_close_matches(
        value.lower(), [c.lower() for c in candidates], n=1
    )
    hint = f"; did you mean '{next(c for c in candidates if c.lower() == near[0].lower())}'?" if near else ""
    return Problem(path, f"unknown {what} '{value}'{hint}", "" if near else f"Known: {', '.join(candidates)}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_PARAM_CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
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
    "warmup_num_steps": (lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 1, "a whole number >= 1"),
    "total_num_steps": (lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 1, "a whole number >= 1"),
    "warmup_type": (lambda v: v in ("log", "linear"), "'log' or 'linear'"),
    "warmup_min_lr": (lambda v: _is_number(v) and v >= 0, "a number >= 0"),
    "warmup_max_lr": (lambda v: _is_number(v) and v >= 0, "a number >= 0"),
    "cos_min_ratio": (lambda v: _is_number(v) and 0 <= v <= 1, "a number in [0, 1]"),
    "warmup_min_ratio": (lambda v: _is_number(v) and 0 <= v <= 1, "a number in [0, 1]"),
}


def _param_problems(where: str, params: Mapping[str, Any], known: frozenset[str]) -> Iterator[Problem]:
    for key, value in params.items():
        path = f"deepspeed.{where}.params.{key}"
        if key == "max_grad_norm":
            yield Problem(path, "not an optimizer's parameter in DeepSpeed", "Set deepspeed.gradient_clipping")
        elif key not in known:
            near = get_close_matches(key, sorted(known), n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            yield Problem(path, f"unknown key{hint}", "" if near else f"Known: {', '.join(sorted(known))}")
        elif value == "auto":
            if f"{where}.params.{key}" not in RESOLVED_AUTOS:
                yield Problem(path, '"auto" cannot be resolved here: nothing else says this value', "Give the value")
        elif key in _PARAM_CHECKS and not _PARAM_CHECKS[key][0](value):
            yield Problem(path, f"expected {_PARAM_CHECKS[key][1]}, got {value!r}")


def optimizer_problems(section: DeepSpeedSection) -> Iterator[Problem]:
    """Unknown optimizer, unknown or wrong parameters, and optimizers that cannot work here."""
    path = "deepspeed.optimizer"
    if section.optimizer is None:
        yield Problem(path, "required, but missing", 'For example {"type": "AdamW", "params": {"lr": 3e-4}}')
        return
    name = section.optimizer.type
    known = optimizer_keys(section.optimizer, section.offload_device != "none")
    if known is None:
        names = [*_DEEPSPEED_NAMES.values(), *(n for n in _TORCH_OPTIMIZERS if n.lower() not in _DEEPSPEED_NAMES)]
        yield _unknown(f"{path}.type", "optimizer", name, names)
        return
    if name in ("LBFGS", "SparseAdam"):
        reason = "evaluates the loss several times a step" if name == "LBFGS" else "takes sparse gradients only"
        yield Problem(f"{path}.type", f"{name} {reason}, which the training step does not offer", "Take another")
    if name.lower() in _MUP and importlib.util.find_spec("mup") is None:
        yield Problem(f"{path}.type", f"{name} needs the package 'mup', which is not installed", "pip install mup")
    zero = section.zero_optimization
    if name.lower() == "muon" and section.zero_stage == 3 and getattr(zero, "reduce_scatter", None) is not False:
        yield Problem(
            "deepspeed.zero_optimization.reduce_scatter",
            "at ZeRO 3 Muon needs whole gradients, which reduce-scatter does not give",
            "Set it to false",
        )
    if name == "Adafactor" and section.zero_stage > 0:
        yield Problem(
            f"{path}.type",
            "Adafactor's second moment is factored over rows and columns, and ZeRO would hand it flat slices: "
            "it would be another algorithm",
            "Set zero_optimization.stage to 0 or take another optimizer",
        )
    found = list(_param_problems("optimizer", section.optimizer.params, known))
    yield from found
    refusal = None if found else _optimizer_refusal(section.optimizer)
    if refusal:
        yield Problem(f"{path}.params", refusal)


def _trial(call: Callable[[], object]) -> str | None:
    """What `call` fails with, in one line; None if it does not."""
    try:
        call()
    except Exception as error:  # every class checks in its own way, or not at all and fails by its arithmetic
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


def _optimizer_refusal(section: OptimizerSection) -> str | None:
    """What the optimizer's own class says against its parameters; DeepSpeed's kernels are not loaded for it."""
    name, params = section.type.lower(), {k: v for k, v in section.params.items() if v != "auto"}
    if name in ("adam", "adamw") and not params.get("torch_adam"):
        return "DeepSpeed's Adam has no amsgrad" if params.get("amsgrad") else None
    kind = torch.optim.AdamW if name in ("adam", "adamw") else _TORCH_OPTIMIZERS.get(section.type)
    params = {k: v for k, v in params.items() if k not in ("torch_adam", "adam_w_mode")}
    known = kind is not None and params.keys() <= _arguments(kind).keys()
    if kind is None or not known:
        return None
    return _trial(lambda: kind([torch.nn.Parameter(torch.zeros(2, 2))], **params))


def _scheduler_refusal(kind: type, section: SchedulerSection) -> str | None:
    params = {
        k: 1 if k in ("total_num_steps", "warmup_max_lr") and v == "auto" else v for k, v in section.params.items()
    }
    params = {k: v for k, v in params.items() if v != "auto"}

    def run() -> None:
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        schedule: Any = kind(optimizer, **params)
        for _ in range(3):
            optimizer.step()
            schedule.step()

    return _trial(run)


def _scheduler_class(name: str) -> type | None:
    if name in lr_schedules.VALID_LR_SCHEDULES:
        return getattr(lr_schedules, name)  # type: ignore[no-any-return]
    kind = getattr(torch.optim.lr_scheduler, name, None)
    base = torch.optim.lr_scheduler.LRScheduler
    # A scheduler that takes other schedulers or functions cannot be written in JSON; one that steps on a metric
    # would need the validation loss inside the optimizer step.
    unfit = ("LRScheduler", "LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler", "ReduceLROnPlateau")
    return kind if isinstance(kind, type) and issubclass(kind, base) and name not in unfit else None


def scheduler_problems(section: DeepSpeedSection) -> Iterator[Problem]:
    """Unknown scheduler, unknown or wrong parameters, missing ones."""
    if section.scheduler is None:
        return
    path = "deepspeed.scheduler"
    kind = _scheduler_class(section.scheduler.type)
    if kind is None:
        yield _unknown(f"{path}.type", "scheduler", section.scheduler.type, list(lr_schedules.VALID_LR_SCHEDULES))
        return
    arguments = _arguments(kind)
    known = frozenset(arguments) - {"last_batch_iteration"}
    found = list(_param_problems("scheduler", section.scheduler.params, known))
    for name, parameter in arguments.items():
        if parameter.default is inspect.Parameter.empty and name not in section.scheduler.params:
            found.append(Problem(f"{path}.params.{name}", "required, but missing"))
    yield from found
    refusal = None if found else _scheduler_refusal(kind, section.scheduler)
    if refusal:
        yield Problem(f"{path}.params", refusal)


# --- batch arithmetic and the resolved whole ---------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Samples of one optimizer step: `train` = `micro` x `accumulation` x data ranks."""

    train: int
    micro: int
    accumulation: int


_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def batch_arithmetic(section: DeepSpeedSection, data_ranks: int) -> Batch | Problem:
    """Derives the third batch key from the two that are given: exactly, or a problem that shows the sum."""
    given = {key: value for key in _BATCH_KEYS if isinstance(value := getattr(section, key), int)}
    train, micro, steps = (given.get(key) for key in _BATCH_KEYS)
    if len(given) < 2:
        missing = ", ".join(key for key in _BATCH_KEYS if key not in given)
        return Problem("deepspeed", f"two of the three batch keys must be given; missing: {missing}")
    if train is not None and train % ((micro or 1) * (steps or 1) * data_ranks):
        sum_of = " x ".join(str(n) for n in (micro, steps, data_ranks) if n is not None)
        names = [k for k in _BATCH_KEYS[1:] if k in given]
        return Problem(
            "deepspeed.train_batch_size",
            f"{train} is not a multiple of {' x '.join(names)} x data ranks ({sum_of} = "
            f"{(micro or 1) * (steps or 1) * data_ranks})",
            "Change one of them, or the number of processes",
        )
    if train is not None and micro is not None and steps is not None and train != micro * steps * data_ranks:
        return Problem(
            "deepspeed.train_batch_size",
            f"{train} is not micro-batch x accumulation x data ranks ({micro} x {steps} x {data_ranks} = "
            f"{micro * steps * data_ranks})",
            "Leave out one of the three",
        )
    if train is None:
        assert micro is not None
        assert steps is not None
        return Batch(micro * steps * data_ranks, micro, steps)
    if micro is None:
        assert steps is not None
        return Batch(train, train // steps // data_ranks, steps)
    return Batch(train, micro, train // micro // data_ranks)


def smallest_data_ranks(section: DeepSpeedSection) -> int:
    """The fewest data ranks for which the batch arithmetic comes out; 1 where that is open."""
    given = [getattr(section, key) for key in _BATCH_KEYS]
    if all(isinstance(value, int) for value in given):
        train, micro, steps = given
        if train % (micro * steps) == 0:
            return int(train // (micro * steps))
    return 1


def class_problems(section: DeepSpeedSection) -> Iterator[Problem]:
    """What DeepSpeed's own classes say about the combination of keys inside one of their sections."""
    for name, kind in (
        ("zero_optimization", DeepSpeedZeroConfig),
        ("bf16", DeepSpeedBF16Config),
        ("fp16", DeepSpeedFP16Config),
    ):
        part = getattr(section, name)
        if part is None:
            continue
        try:
            kind(**part.model_dump(exclude_none=True))
        except (ValueError, AssertionError) as error:
            last = [line.strip() for line in str(error).splitlines() if line.strip()]
            text = next((line for line in last if line.startswith(("Value error", "Assertion failed"))), last[0])
            yield Problem(f"deepspeed.{name}", text.split(" [type=")[0].removeprefix("Value error, "))


AUTO_BUCKETS: Mapping[str, Callable[[int], int]] = {
    "reduce_bucket_size": lambda hidden: hidden * hidden,
    "stage3_prefetch_bucket_size": lambda hidden: int(0.9 * hidden * hidden),
    "stage3_param_persistence_threshold": lambda hidden: 10 * hidden,
}


def resolve(section: DeepSpeedSection, *, data_ranks: int, max_steps: int, hidden_size: int | None) -> dict[str, Any]:
    """The section as DeepSpeed receives it: every "auto" replaced, our own settings added.

    Expects a section without problems. The result is plain JSON.
    """
    batch = batch_arithmetic(section, data_ranks)
    assert isinstance(batch, Batch)
    result = section.model_dump(mode="json", exclude_none=True)
    result.update(zip(_BATCH_KEYS, (batch.train, batch.micro, batch.accumulation), strict=True))
    result["gradient_clipping"] = section.clipping
    optimizer = result["optimizer"]["params"]
    for key, value in (("betas", [0.9, 0.999]), ("eps", 1e-8), ("weight_decay", 0.0)):
        if optimizer.get(key) == "auto":
            optimizer[key] = value
    scheduler = result.get("scheduler", {}).get("params", {})
    for key, value in (
        ("warmup_min_lr", 0.0),
        ("warmup_max_lr", optimizer.get("lr")),
        ("total_num_steps", max_steps),
    ):
        if scheduler.get(key) == "auto":
            scheduler[key] = value
    zero = result.setdefault("zero_optimization", {})
    zero.setdefault("stage", 0)
    for key, of_size in AUTO_BUCKETS.items():
        if zero.get(key) == "auto":
            assert hidden_size is not None, "the rule automatic_buckets_have_a_size refuses it"
            zero[key] = of_size(hidden_size)
    if result["optimizer"]["type"] in _ELEMENTWISE:
        result["zero_allow_untested_optimizer"] = True
    # The throughput timer waits for the device each step; ours measures between logged steps instead.
    result.setdefault("timers", {}).setdefault("throughput", {"enabled": False})
    result.setdefault("log_level", "warning")
    return result


def clips_itself(resolved: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed clips gradients and reports their norm itself under this resolved configuration.

    At ZeRO 0 in fp32 it clips with a function that keeps no norm (and that counts a pipeline's parameters
    wrongly), so there the engine computes norm and clipping and DeepSpeed is told 0.
    """
    half = any(resolved.get(name, {}).get("enabled") for name in ("bf16", "fp16"))
    return bool(resolved["zero_optimization"]["stage"] or half)


def for_engine(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved section as `deepspeed.initialize` gets it: clipping is 0 where the engine clips."""
    return dict(resolved) if clips_itself(resolved) else {**resolved, "gradient_clipping": 0.0}


EXTENSIONS: Mapping[tuple[str, bool], str] = {
    ("adam", False): "FusedAdamBuilder",
    ("adamw", False): "FusedAdamBuilder",
    ("muon", False): "FusedAdamBuilder",
    ("adam", True): "CPUAdamBuilder",
    ("adamw", True): "CPUAdamBuilder",
    ("muon", True): "CPUAdamBuilder",
    ("lion", False): "FusedLionBuilder",
    ("lion", True): "CPULionBuilder",
    ("adagrad", True): "CPUAdagradBuilder",
    ("lamb", False): "FusedLambBuilder",
}
"""DeepSpeed's compiled extension by (optimizer, whether its state is offloaded)."""


def extension_of(resolved: Mapping[str, Any]) -> str | None:
    """The extension that the optimizer of a resolved configuration loads, if any."""
    optimizer = resolved["optimizer"]
    if optimizer.get("params", {}).get("torch_adam"):
        return None
    offload = resolved["zero_optimization"].get("offload_optimizer") or {}
    return EXTENSIONS.get((optimizer["type"].lower(), offload.get("device", "none") != "none"))
