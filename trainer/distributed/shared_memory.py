"""Shared-memory files of DeepSpeed's CPU collectives: 69 MB for each rank."""

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
"""A buffer written more recently may belong to a rank that is starting."""


def remove_stale_buffers() -> int:
    """Remove the shared-memory files of killed ranks, which nothing else removes.

    Removes only files of this user that are older than `MIN_AGE_SECONDS` and that no running process has open or
    mapped. The age matters because DeepSpeed creates, writes and closes a file before it maps it: ranks whose file is
    removed in between wait forever.

    Returns:
        Number of removed files.
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
        return True  # removed by its owner meanwhile


def _find_used_files() -> set[str]:
    """Return the files in shared memory that a process of this user has open or mapped."""
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
    """Unlink this rank's shared-memory file once all ranks have mapped it. Collective: all ranks must call it.

    The kernel frees the memory when the last rank ends, however it ends, so that nothing is left to remove.
    """
    dist.barrier()
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    buffer_name = _BUFFERS.replace("*", f"{os.getuid()}_{address}_{port}_{launch.rank}")
    (_SHARED_MEMORY / buffer_name).unlink(missing_ok=True)
