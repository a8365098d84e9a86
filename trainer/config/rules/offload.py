"""Rules about offloading, and what checkpoints can hold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from trainer.config.deepspeed import is_async_io_available
from trainer.config.rules.registry import Draft, rule
from trainer.errors import Problem


@rule("deepspeed.zero_optimization")
def offload_requires_zero_stage(draft: Draft) -> Iterator[Problem]:
    assert draft.deepspeed is not None
    zero = draft.deepspeed.zero_optimization
    stage = draft.deepspeed.zero_stage
    for key, minimum in (("offload_optimizer", 1), ("offload_param", 3)):
        offload = getattr(zero, key, None)
        device = getattr(offload, "device", None) or "none"
        path = f"deepspeed.zero_optimization.{key}"
        if device != "none" and stage < minimum:
            yield Problem(path, f"needs stage {minimum} or more, and the stage is {stage}")
        elif device == "nvme" and key == "offload_param":
            reason = "'nvme': DeepSpeed 0.19 reads a parameter from there again that it already has, and ends"
            yield Problem(f"{path}.device", reason, "Take 'cpu' here, and 'nvme' for offload_optimizer")


@rule("deepspeed.zero_optimization")
def optimizer_state_checkpointable(draft: Draft) -> Iterator[Problem]:
    """What no checkpoint could hold is told now, not at the first one."""
    assert draft.deepspeed is not None
    zero = draft.deepspeed.zero_optimization
    path = "deepspeed.zero_optimization"
    ratio = getattr(getattr(zero, "offload_optimizer", None), "ratio", None)
    if ratio is not None and ratio < 1:
        reason = f"{ratio}: the part of the state that stays on the device cannot be put into checkpoints"
        yield Problem(f"{path}.offload_optimizer.ratio", reason, "Leave it out")
    if getattr(getattr(zero, "offload_optimizer", None), "super_offload", None):
        reason = "true: its state is in another process and cannot be put into checkpoints"
        yield Problem(f"{path}.offload_optimizer.super_offload", reason, "Leave it out")
    if getattr(zero, "zenflow", None) is not None:
        yield Problem(f"{path}.zenflow", "its state cannot be put into checkpoints", "Leave it out")


_NVME_BUFFERS = 4
"""DeepSpeed's default."""


@rule("deepspeed.zero_optimization", "deepspeed.optimizer")
def nvme_offload_available(draft: Draft) -> Iterator[Problem]:
    assert draft.deepspeed is not None
    offload = getattr(draft.deepspeed.zero_optimization, "offload_optimizer", None)
    path = "deepspeed.zero_optimization.offload_optimizer"
    if offload is None or offload.device != "nvme":
        return
    folder, is_local = offload.nvme_path, draft.device is not None
    if draft.deepspeed.zero_stage != 3:
        yield Problem(f"{path}.device", "'nvme' needs stage 3", "Take 'cpu', or stage 3")
    elif folder is None:
        yield Problem(f"{path}.nvme_path", "missing", "Name a folder on the NVMe disk")
    elif is_local and not (Path(folder).is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        yield Problem(f"{path}.nvme_path", f"{folder} is no folder that can be written to", "Make it, or name another")
    elif is_local and not is_async_io_available():
        yield Problem(
            f"{path}.device", "'nvme': DeepSpeed's async_io cannot be compiled here, for want of libaio's headers",
            "Install libaio-dev (on Red Hat libaio-devel), or take 'cpu'",
        )  # fmt: skip
    sub_groups, buffers = (
        1 + bool(offload.pipeline_read) + bool(offload.pipeline_write),
        offload.buffer_count or _NVME_BUFFERS,
    )
    moments = 1 if draft.deepspeed.optimizer and draft.deepspeed.optimizer.type.lower() in ("adagrad", "lion") else 2
    if buffers < (minimum := (moments + 2) * sub_groups):
        yield Problem(
            f"{path}.buffer_count",
            f"{buffers}: weights, gradients and {moments} moments of {sub_groups} sub-groups are in memory at a time",
            f"Take at least {minimum}",
        )
