"""Rules about offloading, and what checkpoints can hold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from trainer.config.deepspeed import nvme_can_be_read
from trainer.config.rules.table import Draft, rule
from trainer.errors import Problem


@rule("deepspeed.zero_optimization")
def offload_fits_the_stage(draft: Draft) -> Iterator[Problem]:
    assert draft.deepspeed is not None
    zero = draft.deepspeed.zero_optimization
    stage = draft.deepspeed.zero_stage
    for key, least in (("offload_optimizer", 1), ("offload_param", 3)):
        part = getattr(zero, key, None)
        device = getattr(part, "device", None) or "none"
        path = f"deepspeed.zero_optimization.{key}"
        if device != "none" and stage < least:
            yield Problem(path, f"needs stage {least} or more, and the stage is {stage}")
        elif device == "nvme" and key == "offload_param":
            reason = "'nvme': DeepSpeed 0.19 reads a parameter from there again that it already has, and ends"
            yield Problem(f"{path}.device", reason, "Take 'cpu' here, and 'nvme' for offload_optimizer")


@rule("deepspeed.zero_optimization")
def state_can_be_saved(draft: Draft) -> Iterator[Problem]:
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
def nvme_is_there(draft: Draft) -> Iterator[Problem]:
    assert draft.deepspeed is not None
    part = getattr(draft.deepspeed.zero_optimization, "offload_optimizer", None)
    path = "deepspeed.zero_optimization.offload_optimizer"
    if part is None or part.device != "nvme":
        return
    folder, here = part.nvme_path, draft.device is not None
    if draft.deepspeed.zero_stage != 3:
        yield Problem(f"{path}.device", "'nvme' needs stage 3", "Take 'cpu', or stage 3")
    elif folder is None:
        yield Problem(f"{path}.nvme_path", "missing", "Name a folder on the NVMe disk")
    elif here and not (Path(folder).is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        yield Problem(f"{path}.nvme_path", f"{folder} is no folder that can be written to", "Make it, or name another")
    elif here and not nvme_can_be_read():
        yield Problem(
            f"{path}.device", "'nvme': DeepSpeed's async_io cannot be compiled here, for want of libaio's headers",
            "Install libaio-dev (on Red Hat libaio-devel), or take 'cpu'",
        )  # fmt: skip
    ways, buffers = 1 + bool(part.pipeline_read) + bool(part.pipeline_write), part.buffer_count or _NVME_BUFFERS
    states = 1 if draft.deepspeed.optimizer and draft.deepspeed.optimizer.type.lower() in ("adagrad", "lion") else 2
    if buffers < (least := (states + 2) * ways):
        yield Problem(
            f"{path}.buffer_count",
            f"{buffers}: weights, gradients and {states} moments of {ways} sub-groups are in memory at a time",
            f"Take at least {least}",
        )
