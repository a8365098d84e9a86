"""Rules about offloading, and about which optimizer state a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer.config.deepspeed import DeepSpeedSection, is_async_io_available
from trainer.config.rules.registry import Processes, rule_reading
from trainer.errors import Problem
from trainer.files import unwritable_reason

_ZERO = "deepspeed.zero_optimization"


@rule_reading(_ZERO)
def offload_requires_zero_stage(deepspeed: DeepSpeedSection) -> Iterator[Problem]:
    for key, minimum in (("offload_optimizer", 1), ("offload_param", 3)):
        offload = getattr(deepspeed.zero_optimization, key, None)
        device = getattr(offload, "device", None) or "none"
        if device != "none" and deepspeed.zero_stage < minimum:
            yield Problem(f"{_ZERO}.{key}", f"requires stage {minimum} or higher (got {deepspeed.zero_stage})")
        elif device == "nvme" and key == "offload_param":
            reason = "'nvme' fails in DeepSpeed 0.19, which reads a parameter again that is already in memory"
            yield Problem(f"{_ZERO}.{key}.device", reason, "Use 'cpu' here, and 'nvme' for offload_optimizer")


@rule_reading(_ZERO)
def optimizer_state_checkpointable(deepspeed: DeepSpeedSection) -> Iterator[Problem]:
    zero = deepspeed.zero_optimization
    offload = getattr(zero, "offload_optimizer", None)
    ratio = getattr(offload, "ratio", None)
    if ratio is not None and ratio < 1:
        reason = f"must be 1, because a checkpoint cannot hold state that stays on the device (got {ratio})"
        yield Problem(f"{_ZERO}.offload_optimizer.ratio", reason, "Remove it")
    if getattr(offload, "super_offload", None):
        reason = "must be false, because a checkpoint cannot hold state of another process (got true)"
        yield Problem(f"{_ZERO}.offload_optimizer.super_offload", reason, "Remove it")
    if getattr(zero, "zenflow", None) is not None:
        yield Problem(f"{_ZERO}.zenflow", "a checkpoint cannot hold its state", "Remove it")


_DEFAULT_NVME_BUFFERS = 4
"""DeepSpeed's `buffer_count`."""


@rule_reading(_ZERO, "deepspeed.optimizer")
def nvme_offload_available(deepspeed: DeepSpeedSection, processes: Processes) -> Iterator[Problem]:
    offload = getattr(deepspeed.zero_optimization, "offload_optimizer", None)
    key = f"{_ZERO}.offload_optimizer"
    if offload is None or offload.device != "nvme":
        return
    folder, is_local = offload.nvme_path, processes.device is not None
    if deepspeed.zero_stage != 3:
        yield Problem(f"{key}.device", "'nvme' requires stage 3", "Use 'cpu', or stage 3")
    elif folder is None:
        yield Problem(f"{key}.nvme_path", "required, but missing", "Set it to a folder on the NVMe disk")
    elif is_local and (reason := _unusable_folder_reason(Path(folder))) is not None:
        yield Problem(f"{key}.nvme_path", reason, "Create it, or choose another folder")
    elif is_local and not is_async_io_available():
        reason = "'nvme' requires DeepSpeed's async_io, which cannot be compiled here without the headers of libaio"
        yield Problem(f"{key}.device", reason, "Install libaio-dev (on Red Hat libaio-devel), or use 'cpu'")
    # DeepSpeed swaps weights, gradients and moments of a sub-group at once, and of neighboring ones if it pipelines.
    sub_groups = 1 + bool(offload.pipeline_read) + bool(offload.pipeline_write)
    optimizer = deepspeed.optimizer
    moments = 1 if optimizer is not None and optimizer.type.lower() in ("adagrad", "lion") else 2
    buffers, minimum = offload.buffer_count or _DEFAULT_NVME_BUFFERS, (moments + 2) * sub_groups
    if buffers < minimum:
        yield Problem(
            f"{key}.buffer_count",
            f"must be at least {minimum}: weights, gradients and {moments} moments of {sub_groups} sub-groups are in "
            f"memory at once (got {buffers})",
        )


def _unusable_folder_reason(folder: Path) -> str | None:
    return unwritable_reason(folder) if folder.is_dir() else f"'{folder}' is not a directory"
