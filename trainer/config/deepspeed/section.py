"""The `deepspeed` section, typed: DeepSpeed's own pydantic classes mirrored with our strictness."""

from __future__ import annotations

import enum
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel, BeforeValidator, Field, create_model, field_validator

from trainer.config.section import Section
from trainer.errors import Problem

Auto = Literal["auto"]


def _integral(value: object) -> object:
    """5e8 is how people write bucket sizes; JSON reads it as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_integral)]
Count = Annotated[int, BeforeValidator(_integral), Field(ge=1)]


_OMITTED_KEYS = ("zero_optimization.legacy_stage1", "zero_optimization.elastic_checkpoint")
"""Keys that DeepSpeed's classes still have and that do nothing, or nothing here; see `UNSUPPORTED`."""


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

    `auto` holds the dotted paths at which "auto" may stand. Deprecated keys are left out, and those of `_OMITTED_KEYS`.
    """
    fields: dict[str, Any] = {}
    for name, field in source.model_fields.items():
        extra = field.json_schema_extra
        key = field.alias or name
        if (isinstance(extra, Mapping) and extra.get("deprecated")) or f"{path}.{key}" in _OMITTED_KEYS:
            continue
        kind = _strict(field.annotation, f"{path}.{key}", auto)
        if field.metadata:
            kind = Annotated[(kind, *field.metadata)]
        if f"{path}.{key}" in auto:
            kind = kind | Auto
        fields[key] = (kind | None, None)
    return create_model(source.__name__, __base__=Section, **fields)


RESOLVED_AUTOS: Mapping[str, str] = {
    "bf16.enabled": "true where the device has it and fp16 is not true",
    "fp16.enabled": "false",
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
"""Where "auto" may stand and what it becomes: the meaning that Hugging Face's Trainer gives it. Those of `enabled` are
resolved by `normalize_section`, before the section is built."""

_AUTO = frozenset(RESOLVED_AUTOS)
_ZeroSection = mirror(DeepSpeedZeroConfig, "zero_optimization", _AUTO)
_Dtype = Literal["fp32", "fp16", "bf16"]


PER_GROUP_ARGUMENTS = frozenset((
    "base_lr", "max_lr", "base_momentum", "max_momentum", "swa_lr", "lr_range_test_min_lr",
    "cycle_min_lr", "cycle_max_lr", "cycle_min_mom", "cycle_max_mom", "warmup_min_lr", "warmup_max_lr",
))  # fmt: skip
"""Arguments for which schedulers take a list with one value for each parameter group. Here the weights of a rank decide
how many groups it has, so a list of several values has no meaning."""


class OptimizerSection(Section):
    type: str
    """Adam, AdamW, Adagrad, Lion, Muon (DeepSpeed's), or any of `torch.optim` by name."""

    params: dict[str, Any] = {}
    """Arguments of the optimizer's class."""

    legacy_fusion: bool | None = None


class SchedulerSection(Section):
    type: str
    """LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR (DeepSpeed's), WSD (ours: warm-up, stable, decay),
    or one of `torch.optim.lr_scheduler`."""

    params: dict[str, Any] = {}
    """Arguments of the scheduler's class."""

    @field_validator("params")
    @classmethod
    def _one_value_for_all_groups(cls, params: dict[str, Any]) -> dict[str, Any]:
        """A list of one is its number, however many parameter groups a rank has."""

        def single(key: str, value: Any) -> Any:
            return value[0] if key in PER_GROUP_ARGUMENTS and isinstance(value, list) and len(value) == 1 else value

        return {key: single(key, value) for key, value in params.items()}


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

    bf16: mirror(DeepSpeedBF16Config, "bf16", _AUTO) | None = None  # type: ignore[valid-type]
    fp16: mirror(DeepSpeedFP16Config, "fp16", _AUTO) | None = None  # type: ignore[valid-type]
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


def deepspeed_class_problems(section: DeepSpeedSection) -> Iterator[Problem]:
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
