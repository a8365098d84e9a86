"""Offload of optimizer state to NVMe, without the state that DeepSpeed 0.19 loses or mixes up."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from trainer.compat.deepspeed.internals import optimizer_utils

_MAX_BLOCK_BYTES = 4096


def prepare_nvme(settings: dict[str, Any], output_dir: str) -> None:
    """Give the run a directory on the disk, and align writes to the disk's blocks.

    DeepSpeed's files have the same names in every run. It does not detect short writes, which happen if a write does
    not end at a block boundary.

    Args:
        settings: DeepSpeed's configuration; its `nvme_path` is replaced.
        output_dir: the run directory, which names the directory on the disk.
    """
    zero = settings["zero_optimization"]
    offload = zero.get("offload_optimizer") or {}
    if offload.get("device") != "nvme":
        return
    run = Path(output_dir).expanduser().absolute()
    run_digest = hashlib.sha256(str(run).encode()).hexdigest()[:12]
    directory = Path(offload["nvme_path"]) / f"{run.name}-{run_digest}"
    settings["zero_optimization"] = {**zero, "offload_optimizer": {**offload, "nvme_path": str(directory)}}
    directory.mkdir(exist_ok=True)
    optimizer_utils.AIO_ALIGNED_BYTES = max(optimizer_utils.AIO_ALIGNED_BYTES, _block_bytes(directory))


def keep_unaligned_gradients(optimizer: object) -> None:
    """Keep gradients in host memory that DeepSpeed would write to NVMe and could not read back.

    It reads them with direct I/O into the middle of a buffer. Where a gradient does not start there at a multiple of
    the disk's block, the kernel refuses the read; the error is not checked, and the stale contents of the buffer are
    used as the gradient.
    """
    swapper = getattr(optimizer, "optimizer_swapper", None)
    if swapper is None:
        return
    adjust, block = swapper._adjust_for_misaligned_lengths, _block_bytes(Path(swapper.swap_folder))

    def keep_unaligned(tensors: list[torch.Tensor], offsets: list[int]) -> Any:
        pairs = zip(tensors, offsets, strict=True)
        kept = [_copy_to_cpu(tensor) if offset * tensor.element_size() % block else tensor for tensor, offset in pairs]
        return adjust(kept, offsets)

    swapper._adjust_for_misaligned_lengths = keep_unaligned


def _copy_to_cpu(gradient: torch.Tensor) -> torch.Tensor:
    cpu_gradient = gradient.to("cpu")
    cpu_gradient.swappable = False  # type: ignore[attr-defined]
    return cpu_gradient


def _block_bytes(directory: Path) -> int:
    """Return the logical block size of a directory's disk; the largest common one if the kernel reports none."""
    device = directory.stat().st_dev
    block_device = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    for queue in (block_device / "queue", block_device.parent / "queue"):
        with contextlib.suppress(OSError, ValueError):
            return int((queue / "logical_block_size").read_text())
    return _MAX_BLOCK_BYTES
