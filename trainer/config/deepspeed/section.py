"""The typed `deepspeed` section: strict mirrors of DeepSpeed's pydantic classes."""

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
    """Convert a whole float to an integer, because bucket sizes are often written as 5e8."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_integral)]
Count = Annotated[int, BeforeValidator(_integral), Field(ge=1)]


_OMITTED_KEYS = ("zero_optimization.legacy_stage1", "zero_optimization.elastic_checkpoint")
"""Keys of DeepSpeed's classes that have no effect; see `UNSUPPORTED`."""


def _strict(annotation: object, path: str, auto: frozenset[str]) -> object:
    """Return the type of a DeepSpeed field without DeepSpeed's silent conversions."""
    if get_origin(annotation) in (Union, types.UnionType):
        return Union[tuple(_strict(member, path, auto) for member in get_args(annotation))]  # noqa: UP007
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return mirror(annotation, path, auto)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return Literal[tuple(dict.fromkeys(member.value for member in annotation))]
    if annotation is int:
        return Integer
    return str if annotation is Path else annotation


def mirror(source: type[BaseModel], path: str, auto: frozenset[str] = frozenset()) -> type[Section]:
    """Create a strict section with the keys, types and bounds of a class of DeepSpeed.

    Deprecated keys and those of `_OMITTED_KEYS` are omitted.

    Args:
        source: DeepSpeed's class.
        path: Dotted path of the section.
        auto: Dotted paths whose value may be "auto".
    """
    fields: dict[str, Any] = {}
    for name, field in source.model_fields.items():
        extra = field.json_schema_extra
        key = field.alias or name
        if (isinstance(extra, Mapping) and extra.get("deprecated")) or f"{path}.{key}" in _OMITTED_KEYS:
            continue
        field_type: Any = _strict(field.annotation, f"{path}.{key}", auto)
        if field.metadata:
            field_type = Annotated[(field_type, *field.metadata)]
        if f"{path}.{key}" in auto:
            field_type = field_type | Auto
        fields[key] = (field_type | None, None)
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
"""Value of "auto" by key, as in Hugging Face's Trainer. `normalize_section` resolves those of `enabled`."""

_AUTO = frozenset(RESOLVED_AUTOS)
_ZeroSection = mirror(DeepSpeedZeroConfig, "zero_optimization", _AUTO)
_Dtype = Literal["fp32", "fp16", "bf16"]


PER_GROUP_ARGUMENTS = frozenset(
    (
        "base_lr",
        "max_lr",
        "base_momentum",
        "max_momentum",
        "swa_lr",
        "lr_range_test_min_lr",
        "cycle_min_lr",
        "cycle_max_lr",
        "cycle_min_mom",
        "cycle_max_mom",
        "warmup_min_lr",
        "warmup_max_lr",
    )
)
"""Arguments for which schedulers accept a list with one value for each parameter group. The number of groups of a rank
depends on the weights that it holds, so that a list of several values has no meaning."""


class OptimizerSection(Section):
    """The optimizer."""

    type: str
    """Adam, AdamW, Adagrad, Lion, Muon (DeepSpeed's), or any of `torch.optim` by name."""

    params: dict[str, Any] = {}
    """Arguments of the optimizer's class."""

    legacy_fusion: bool | None = None


class SchedulerSection(Section):
    """The learning-rate schedule. Without it the rate is constant."""

    type: str
    """LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR (DeepSpeed's), WSD (ours: warm-up, stable, decay),
    or one of `torch.optim.lr_scheduler`."""

    params: dict[str, Any] = {}
    """Arguments of the scheduler's class."""

    @field_validator("params")
    @classmethod
    def _one_value_for_all_groups(cls, params: dict[str, Any]) -> dict[str, Any]:
        """Replace lists of one value, which applies to all parameter groups, by the value."""

        def single(key: str, value: object) -> object:
            return value[0] if key in PER_GROUP_ARGUMENTS and isinstance(value, list) and len(value) == 1 else value

        return {key: single(key, value) for key, value in params.items()}


class TimersSection(Section):
    """DeepSpeed's timers."""

    throughput: mirror(DeepSpeedThroughputTimerConfig, "timers.throughput") | None = None  # type: ignore[valid-type]


class FlopsProfilerSection(Section):
    """DeepSpeed's per-module profile of one step."""

    enabled: bool = False
    recompute_fwd_factor: float = 0.0
    profile_step: Count = 1
    module_depth: Integer = -1
    top_modules: Count = 1
    detailed: bool = True
    output_file: str | None = None


class DataTypesSection(Section):
    """Data types other than the precision of the run."""

    grad_accum_dtype: _Dtype | None = None
    param_dtype: _Dtype | None = None
    buffer_dtype: _Dtype | None = None
    keep_in_fp32_modules: Auto | list[str] | None = None


class AioSection(Section):
    """DeepSpeed's access to NVMe."""

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
    are required."""

    train_micro_batch_size_per_gpu: Count | Auto | None = None
    """Samples of one forward pass on one data rank."""

    gradient_accumulation_steps: Count | Auto | None = None
    """Micro-batches of one optimizer step on one data rank."""

    optimizer: OptimizerSection | None = None
    scheduler: SchedulerSection | None = None

    gradient_clipping: Annotated[float, Field(ge=0)] | Auto | None = None
    """Maximum global gradient norm; 0 disables clipping. Default: 1.0."""

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
    """Steps between two progress lines of DeepSpeed. Default: none, because the console has ours."""

    wall_clock_breakdown: bool | None = None
    memory_breakdown: bool | None = None
    dump_state: bool | None = None
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = None
    """Level of DeepSpeed's log. Default: warning."""

    timers: TimersSection | None = None
    comms_logger: mirror(CommsLoggerConfig, "comms_logger") | None = None  # type: ignore[valid-type]
    flops_profiler: FlopsProfilerSection | None = None

    @property
    def zero_stage(self) -> int:
        """ZeRO stage; 0 by default."""
        return int(getattr(self.zero_optimization, "stage", None) or 0)

    @property
    def offload_device(self) -> str:
        """Device that the optimizer state is offloaded to: `none`, `cpu` or `nvme`."""
        offload = getattr(self.zero_optimization, "offload_optimizer", None)
        return str(getattr(offload, "device", None) or "none")

    @property
    def precision(self) -> Literal["fp32", "bf16", "fp16"]:
        """Precision that the model computes in."""
        if self.bf16 is not None and self.bf16.enabled:
            return "bf16"
        return "fp16" if self.fp16 is not None and self.fp16.enabled else "fp32"

    @property
    def clipping(self) -> float:
        """Maximum global gradient norm; 0 if it is not clipped."""
        return 1.0 if self.gradient_clipping in (None, "auto") else float(self.gradient_clipping)


def deepspeed_class_problems(section: DeepSpeedSection) -> Iterator[Problem]:
    """Yield what DeepSpeed's classes refuse about combinations of keys within their sections."""
    for name, section_class in (
        ("zero_optimization", DeepSpeedZeroConfig),
        ("bf16", DeepSpeedBF16Config),
        ("fp16", DeepSpeedFP16Config),
    ):
        part = getattr(section, name)
        if part is None:
            continue
        try:
            section_class(**part.model_dump(exclude_none=True))
        except (ValueError, AssertionError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            text = next((line for line in lines if line.startswith(("Value error", "Assertion failed"))), lines[0])
            yield Problem(f"deepspeed.{name}", text.split(" [type=")[0].removeprefix("Value error, "))
