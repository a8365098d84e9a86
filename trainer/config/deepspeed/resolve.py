"""Batch arithmetic, every "auto" resolved, and what DeepSpeed receives in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from deepspeed.accelerator import get_accelerator

from trainer.config.deepspeed.optimizers import ELEMENTWISE
from trainer.config.deepspeed.section import DeepSpeedSection
from trainer.config.deepspeed.wsd import WSD
from trainer.errors import Problem


@dataclass(frozen=True)
class Batch:
    """Samples of one optimizer step: `batch_size` = `micro_batch_size` x `accumulation_steps` x data ranks."""

    batch_size: int
    micro_batch_size: int
    accumulation_steps: int


BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def batch_arithmetic(section: DeepSpeedSection, data_ranks: int) -> Batch | Problem | None:
    """Derives the third batch key from the two that are given: exactly, or a problem that shows the sum.

    None where fewer are given, which `missing_values` asks for.
    """
    given = {key: value for key in BATCH_KEYS if isinstance(value := getattr(section, key), int)}
    train, micro, steps = (given.get(key) for key in BATCH_KEYS)
    if len(given) < 2:
        return None
    if train is not None and train % ((micro or 1) * (steps or 1) * data_ranks):
        sum_of = " x ".join(str(n) for n in (micro, steps, data_ranks) if n is not None)
        names = [k for k in BATCH_KEYS[1:] if k in given]
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


def min_data_ranks(section: DeepSpeedSection) -> int:
    """The fewest data ranks for which the batch arithmetic comes out; 1 where that is open."""
    given = [getattr(section, key) for key in BATCH_KEYS]
    if all(isinstance(value, int) for value in given):
        train, micro, steps = given
        if train % (micro * steps) == 0:
            return int(train // (micro * steps))
    return 1


AUTO_BUCKETS: Mapping[str, Callable[[int], int]] = {
    "reduce_bucket_size": lambda hidden: hidden * hidden,
    "stage3_prefetch_bucket_size": lambda hidden: int(0.9 * hidden * hidden),
    "stage3_param_persistence_threshold": lambda hidden: 10 * hidden,
}


def resolve(
    section: DeepSpeedSection, *, data_ranks: int, steps: int | None, hidden_size: int | None
) -> dict[str, Any]:
    """The section as DeepSpeed receives it: every "auto" replaced, our own settings added.

    Expects a section without problems. The result is plain JSON.

    Args:
        steps: of the whole run; None while they are not known: what follows from them stays "auto".
    """
    batch = batch_arithmetic(section, data_ranks)
    assert isinstance(batch, Batch)
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
        if zero.get(key) == "auto":
            assert hidden_size is not None, "the rule auto_buckets_require_hidden_size refuses it"
            zero[key] = of_size(hidden_size)
    if result["optimizer"]["type"] in ELEMENTWISE:
        result["zero_allow_untested_optimizer"] = True
    # The throughput timer waits for the device each step; ours measures between logged steps instead.
    result.setdefault("timers", {}).setdefault("throughput", {"enabled": False})
    result.setdefault("log_level", "warning")
    return result


def deepspeed_clips_gradients(resolved: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed clips gradients and reports their norm itself under this resolved configuration.

    At ZeRO 0 in fp32 it clips with a function that keeps no norm (and that counts a pipeline's parameters
    wrongly), so there the engine computes norm and clipping and DeepSpeed is told 0.
    """
    half = any(resolved.get(name, {}).get("enabled") for name in ("bf16", "fp16"))
    return bool(resolved["zero_optimization"]["stage"] or half)


def engine_settings(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved section as `deepspeed.initialize` gets it: clipping is 0 where the engine clips, and a schedule of
    ours, which DeepSpeed does not know, is left out."""
    settings = dict(resolved) if deepspeed_clips_gradients(resolved) else {**resolved, "gradient_clipping": 0.0}
    if custom_schedule(resolved) is not None:
        del settings["scheduler"]
    return settings


def custom_schedule(resolved: Mapping[str, Any]) -> Callable[[Any], WSD] | None:
    """What makes the schedule for an optimizer, where it is none of DeepSpeed's or torch's."""
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
"""DeepSpeed's compiled extension by (optimizer, whether its state is offloaded)."""


_NVME = "AsyncIOBuilder"


def required_extensions(resolved: Mapping[str, Any]) -> list[str]:
    """The extensions that the optimizer of a resolved configuration loads."""
    optimizer = resolved["optimizer"]
    device = (resolved["zero_optimization"].get("offload_optimizer") or {}).get("device", "none")
    found = [_NVME] if device == "nvme" else []
    own = EXTENSIONS.get((optimizer["type"].lower(), device != "none"))
    return found if own is None or optimizer.get("params", {}).get("torch_adam") else [own, *found]


def is_async_io_available() -> bool:
    """Whether DeepSpeed's extension for NVMe can be compiled here."""
    builder = get_accelerator().create_op_builder(_NVME)
    return builder is not None and bool(builder.is_compatible(verbose=False))
