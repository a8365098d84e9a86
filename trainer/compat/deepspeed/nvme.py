"""What DeepSpeed 0.19 needs so that optimizer state on NVMe is neither lost nor mixed up."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.swap_tensor import optimizer_utils

_MAX_BLOCK_BYTES = 4096


def prepare_nvme(settings: dict[str, Any], output_dir: str) -> None:
    """Gives the run a folder of its own on the disk, for DeepSpeed's files have the same names in every run; and lets
    DeepSpeed write multiples of the disk's block, for it does not notice where less than it asked for was written.

    Args:
        settings: as DeepSpeed gets them; the path in them is replaced.
    """
    offload = settings["zero_optimization"].get("offload_optimizer") or {}
    if offload.get("device") != "nvme":
        return
    run = Path(output_dir).expanduser().absolute()
    run_dir = Path(offload["nvme_path"]) / f"{run.name}-{hashlib.sha256(str(run).encode()).hexdigest()[:12]}"
    settings["zero_optimization"] = {
        **settings["zero_optimization"], "offload_optimizer": {**offload, "nvme_path": str(run_dir)},
    }  # fmt: skip
    run_dir.mkdir(exist_ok=True)
    optimizer_utils.AIO_ALIGNED_BYTES = max(optimizer_utils.AIO_ALIGNED_BYTES, _block_bytes(run_dir))


def keep_unaligned_gradients(optimizer: Any) -> None:
    """Keeps those gradients in host memory that DeepSpeed would write to NVMe and not read back.

    It reads them past the kernel's cache into the middle of a buffer. Where a gradient does not begin there at a
    multiple of the disk's block, the kernel refuses; nobody looks, and what lay in the buffer is taken for it.
    """
    swapper = getattr(optimizer, "optimizer_swapper", None)
    if swapper is None:
        return
    adjust, block = swapper._adjust_for_misaligned_lengths, _block_bytes(Path(swapper.swap_folder))

    def keep_unaligned(tensors: list[torch.Tensor], offsets: list[int]) -> Any:
        pairs = zip(tensors, offsets, strict=True)
        return adjust([_copy_to_cpu(t) if offset * t.element_size() % block else t for t, offset in pairs], offsets)

    swapper._adjust_for_misaligned_lengths = keep_unaligned


def _copy_to_cpu(gradient: torch.Tensor) -> torch.Tensor:
    cpu_gradient = gradient.to("cpu")
    cpu_gradient.swappable = False  # type: ignore[attr-defined]
    return cpu_gradient


def _block_bytes(directory: Path) -> int:
    """Bytes of the logical block of the disk under a folder; the most that is usual where the kernel does not say."""
    device = directory.stat().st_dev
    block_device = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    for queue in (block_device / "queue", block_device.parent / "queue"):
        with contextlib.suppress(OSError, ValueError):
            return int((queue / "logical_block_size").read_text())
    return _MAX_BLOCK_BYTES
