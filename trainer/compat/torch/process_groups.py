"""Process groups: timeouts of existing groups, and groups that span several default groups."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, Store


def set_timeout_of_all_groups(timeout: timedelta) -> None:
    """Set the timeout of collectives in every registered process group of this rank, whoever has created it.

    torch sets a timeout only when it creates a group, and DeepSpeed creates its groups without one. Gloo's
    point-to-point operations keep the timeout that their group was created with.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def gloo_group(store: Store, rank: int, size: int, timeout: timedelta) -> ProcessGroup:
    """Create a process group of host memory that is independent of the default group.

    `torch.distributed.new_group` takes ranks of the default group only. Collective: all ranks of the new group must
    call it, with a store of their own.
    """
    group = ProcessGroup(store, rank, size)
    backend = dist.ProcessGroupGloo(store, rank, size, timeout)
    group._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, backend)
    return group
