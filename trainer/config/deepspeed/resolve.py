"""Batch arithmetic, the resolution of every "auto", and the settings that DeepSpeed receives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from deepspeed.accelerator import get_accelerator

from trainer.config.deepspeed.optimizers import ELEMENTWISE
from trainer.config.deepspeed.section import DeepSpeedSection
from trainer.config.deepspeed.wsd import WSD, HasParameterGroups
from trainer.errors import Problem


@dataclass(frozen=True)
class Batch:
    """Samples of one optimizer step, with `batch_size` = `micro_batch_size` x `accumulation_steps` x data ranks."""

    batch_size: int
    micro_batch_size: int
    accumulation_steps: int


BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def batch_arithmetic(section: DeepSpeedSection, data_ranks: int) -> Batch | Problem | None:
    """Derive the third batch key from the other two.

    The keys satisfy train batch = micro-batch x accumulation steps x data ranks. With two of them the third is exact or
    a problem; with three they must agree. The product of the known factors must divide the train batch in any case: the
    missing factor is the quotient.

    Returns:
        None if fewer than two keys are set, which `missing_values` reports.
    """
    values = {key: value for key in BATCH_KEYS if isinstance(value := getattr(section, key), int)}
    train, micro, steps = (values.get(key) for key in BATCH_KEYS)
    if len(values) < 2:
        return None
    if train is None and micro is not None and steps is not None:
        return Batch(micro * steps * data_ranks, micro, steps)
    if train is None:
        return None
    product = (micro or 1) * (steps or 1) * data_ranks
    shown = " x ".join(str(factor) for factor in (micro, steps, data_ranks) if factor is not None)
    if train % product:
        names = " x ".join(key for key in BATCH_KEYS[1:] if key in values)
        reason = f"must be a multiple of {names} x data ranks, {shown} = {product} (got {train})"
        return Problem("deepspeed.train_batch_size", reason, "Change one of them, or the number of processes")
    quotient = train // product
    if micro is not None and steps is not None and quotient != 1:
        reason = f"must be micro-batch x accumulation x data ranks, {shown} = {product} (got {train})"
        return Problem("deepspeed.train_batch_size", reason, "Remove one of the three")
    return Batch(train, quotient if micro is None else micro, quotient if steps is None else steps)


def min_data_ranks(section: DeepSpeedSection) -> int:
    """Return the smallest number of data ranks that the batch keys allow; 1 unless all three are set."""
    values = [getattr(section, key) for key in BATCH_KEYS]
    if all(isinstance(value, int) for value in values):
        train, micro, steps = values
        if train % (micro * steps) == 0:
            return int(train // (micro * steps))
    return 1


AUTO_BUCKETS: Mapping[str, Callable[[int], int]] = {
    "reduce_bucket_size": lambda hidden: hidden * hidden,
    "stage3_prefetch_bucket_size": lambda hidden: int(0.9 * hidden * hidden),
    "stage3_param_persistence_threshold": lambda hidden: 10 * hidden,
}
"""Value of "auto" as a function of the hidden size, by key of `zero_optimization`."""


def resolve(
    section: DeepSpeedSection, *, data_ranks: int, steps: int | None, hidden_size: int | None
) -> dict[str, Any]:
    """Return the section as plain JSON with every "auto" resolved, and Tessera's own settings added.

    Args:
        section: A section without problems.
        data_ranks: Size of the data axis.
        steps: Optimizer steps of the run; None while they are unknown: values derived from them stay "auto".
        hidden_size: Hidden size of the model; None if it has several, which `auto_buckets_require_hidden_size` refuses
            where "auto" depends on it.
    """
    batch = batch_arithmetic(section, data_ranks)
    if not isinstance(batch, Batch):
        raise RuntimeError(f"the batch keys are checked before the section is resolved (got {batch})")
    result = section.model_dump(mode="json", exclude_none=True)
    result.update(zip(BATCH_KEYS, (batch.batch_size, batch.micro_batch_size, batch.accumulation_steps), strict=True))
    result["gradient_clipping"] = section.clipping
    optimizer = result["optimizer"]["params"]
    for key, value in (("betas", [0.9, 0.999]), ("eps", 1e-8), ("weight_decay", 0.0)):
        if optimizer.get(key) == "auto":
            optimizer[key] = value
    scheduler = result.get("scheduler", {}).get("params", {})
    automatic = {"warmup_min_lr": 0.0, "warmup_max_lr": optimizer.get("lr"), "total_num_steps": steps}
    for key, value in automatic.items():
        if scheduler.get(key) == "auto" and not (key == "total_num_steps" and steps is None):
            scheduler[key] = value
    zero = result.setdefault("zero_optimization", {})
    zero.setdefault("stage", 0)
    for key, of_size in AUTO_BUCKETS.items():
        if zero.get(key) == "auto" and hidden_size is not None:
            zero[key] = of_size(hidden_size)
    if result["optimizer"]["type"] in ELEMENTWISE:
        result["zero_allow_untested_optimizer"] = True
    # DeepSpeed's throughput timer synchronizes with the device in each step; the meter only at logged steps.
    result.setdefault("timers", {}).setdefault("throughput", {"enabled": False})
    result.setdefault("log_level", "warning")
    return result


def deepspeed_clips_gradients(resolved: Mapping[str, Any]) -> bool:
    """Return whether DeepSpeed clips gradients and reports their norm under this resolved configuration.

    At ZeRO 0 in fp32 its clipping does not report the norm, and computes it incorrectly for pipelines. There the engine
    computes the norm and clips, and DeepSpeed's clipping is disabled.
    """
    half = any(resolved.get(name, {}).get("enabled") for name in ("bf16", "fp16"))
    return bool(resolved["zero_optimization"]["stage"] or half)


def engine_settings(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the resolved section for `deepspeed.initialize`.

    Clipping is 0 where the engine clips, and a schedule that DeepSpeed does not have is removed.
    """
    settings = dict(resolved) if deepspeed_clips_gradients(resolved) else {**resolved, "gradient_clipping": 0.0}
    if custom_schedule(resolved) is not None:
        del settings["scheduler"]
    return settings


def custom_schedule(resolved: Mapping[str, Any]) -> Callable[[HasParameterGroups], WSD] | None:
    """Return a function from an optimizer to its schedule, if it is neither DeepSpeed's nor PyTorch's."""
    section = resolved.get("scheduler")
    if section is None or section["type"] != WSD.__name__:
        return None
    return partial(WSD, **section["params"])


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
}
"""DeepSpeed's compiled extension by optimizer and whether its state is offloaded."""

_NVME = "AsyncIOBuilder"


def required_extensions(resolved: Mapping[str, Any]) -> list[str]:
    """Return the compiled extensions that the optimizer of a resolved configuration loads."""
    optimizer = resolved["optimizer"]
    device = (resolved["zero_optimization"].get("offload_optimizer") or {}).get("device", "none")
    extensions = [_NVME] if device == "nvme" else []
    extension = EXTENSIONS.get((optimizer["type"].lower(), device != "none"))
    if extension is None or optimizer.get("params", {}).get("torch_adam"):
        return extensions
    return [extension, *extensions]


def is_async_io_available() -> bool:
    """Return whether DeepSpeed's extension for NVMe can be compiled on this machine."""
    builder = get_accelerator().create_op_builder(_NVME)
    return builder is not None and bool(builder.is_compatible(verbose=False))
