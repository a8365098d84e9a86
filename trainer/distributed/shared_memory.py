"""The shared-memory files that DeepSpeed's CPU collective leaves: 69 MB a rank."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch.distributed as dist

from trainer.distributed.environment import Launch

_SHARED_MEMORY = Path("/dev/shm")
_BUFFERS = "deepspeed_allreduce_buffer_*"


def remove_stale_buffers() -> int:
    """Removes the shared-memory files of killed ranks: 69 MB each, and nobody else ever does.

    Only files of this user that no living process has mapped. Returns how many were removed.
    """
    files = list(_SHARED_MEMORY.glob(_BUFFERS.replace("*", f"{os.getuid()}_*")))
    if not files:
        return 0
    mapped: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            mapped.update(
                line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines() if "/dev/shm/" in line
            )
    stale = [f for f in files if str(f) not in mapped]
    for file in stale:
        file.unlink(missing_ok=True)
    return len(stale)


def unlink_own_buffer(launch: Launch) -> None:
    """Takes this rank's shared-memory file out of the folder once all ranks have it mapped.

    The memory stays theirs until they end, however they end: nothing is left for anybody to remove.
    """
    dist.barrier()
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    own = _BUFFERS.replace("*", f"{os.getuid()}_{address}_{port}_{launch.rank}")
    (_SHARED_MEMORY / own).unlink(missing_ok=True)
