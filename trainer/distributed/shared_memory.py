"""The shared-memory files that DeepSpeed's CPU collective leaves: 69 MB a rank."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import torch.distributed as dist

from trainer.distributed.environment import Launch

_SHARED_MEMORY = Path("/dev/shm")
_BUFFERS = "deepspeed_allreduce_buffer_*"

MIN_AGE_SECONDS = 60.0
"""A buffer that was written less than so long ago may belong to a rank that is starting."""


def remove_stale_buffers() -> int:
    """Remove the shared-memory files of killed ranks: 69 MB each, and nobody else ever does.

    Only files of this user, older than `MIN_AGE_SECONDS`, that no living process has open or mapped: DeepSpeed creates
    a file, writes it, closes it, and maps it only then, and ranks whose file was removed in between wait forever.

    Returns:
        How many were removed.
    """
    files = [f for f in _SHARED_MEMORY.glob(_BUFFERS.replace("*", f"{os.getuid()}_*")) if not _is_recent(f)]
    if not files:
        return 0
    used_files = _find_used_files()
    stale = [file for file in files if str(file) not in used_files and not _is_recent(file)]
    for file in stale:
        file.unlink(missing_ok=True)
    return len(stale)


def _is_recent(file: Path) -> bool:
    try:
        return time.time() - file.stat().st_mtime < MIN_AGE_SECONDS
    except OSError:
        return True  # its owner has removed it meanwhile


def _find_used_files() -> set[str]:
    """Files in shared memory that a process of this user has open or mapped."""
    used_files: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            lines = (process / "maps").read_text().splitlines()
            used_files.update(line.split(maxsplit=5)[-1].strip() for line in lines if str(_SHARED_MEMORY) in line)
        with contextlib.suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    used_files.add(os.readlink(descriptor))
    return used_files


def unlink_shared_buffer(launch: Launch) -> None:
    """Unlink this rank's shared-memory file once all ranks have it mapped. All ranks must call it.

    The memory stays theirs until they end, however they end: nothing is left for anybody to remove.
    """
    dist.barrier()
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    buffer_name = _BUFFERS.replace("*", f"{os.getuid()}_{address}_{port}_{launch.rank}")
    (_SHARED_MEMORY / buffer_name).unlink(missing_ok=True)
