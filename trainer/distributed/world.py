"""A joined world: process groups, device, seeds."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import socket
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from trainer.distributed.environment import Launch, complete_environment, local_device
from trainer.distributed.extensions import load_extension
from trainer.distributed.phases import JOIN_TIMEOUT, Phases
from trainer.distributed.shared_memory import remove_stale_buffers, unlink_shared_buffer
from trainer.distributed.store import open_store
from trainer.topology import Axis, Topology

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """A joined world, as one rank sees it."""

    topology: Topology
    device: torch.device
    seed: int
    """`run.seed`."""

    store: Store
    """Key-value store of all ranks: for what must not wait for a collective. See `open_store`."""

    groups: dict[Axis, Any]
    """The process group of this rank along each axis of more than one rank; None stands for all ranks."""

    phases: Phases = field(default_factory=Phases)
    """What this rank is doing, for the watchdog."""

    _neighbours: dict[int, Any] = field(default_factory=dict, repr=False)
    _of_stages: dict[tuple[int, ...], Any] = field(default_factory=dict, repr=False)

    @property
    def is_rank_zero(self) -> bool:
        return self.topology.rank == 0

    def seed_step(self, step: int) -> None:
        """Before a step: its random numbers; see `seed_everything`."""
        seed_everything(self.seed, self.topology, step)

    def tensor_subgroup(self, count: int) -> Any:
        """The group of `count` neighbouring tensor ranks that this rank is in: those that share a key/value head.

        Every rank of the world must ask for the same counts in the same order.
        """
        if count not in self._neighbours:
            for ranks in self.topology.groups("tensor"):
                for start in range(0, len(ranks), count):
                    group = dist.new_group(ranks[start : start + count], timeout=JOIN_TIMEOUT)
                    if self.topology.rank in ranks[start : start + count]:
                        self._neighbours[count] = group
        return self._neighbours[count]

    def pipeline_subgroup(self, stages: tuple[int, ...]) -> Any:
        """The group of the ranks at this rank's place in `stages`; None on a rank of another stage.

        Every rank of the world must ask for the same stages in the same order.
        """
        if stages not in self._of_stages:
            self._of_stages[stages] = None
            for ranks in self.topology.groups("pipeline"):
                members = [ranks[stage] for stage in stages]
                group = dist.new_group(members, timeout=JOIN_TIMEOUT)
                if self.topology.rank in members:
                    self._of_stages[stages] = group
        return self._of_stages[stages]


def _process_groups(topology: Topology) -> dict[Axis, Any]:
    """This rank's group along each axis. Every rank makes every group, in the same order, as torch demands; none is
    made for an axis of one rank, or where the default group is the one."""
    own: dict[Axis, Any] = {}
    axes: tuple[Axis, ...] = ("pipeline", "data", "tensor")
    for axis in axes:
        groups = topology.groups(axis)
        if len(groups[0]) == 1:
            continue
        if len(groups) == 1:
            own[axis] = None
            continue
        for ranks in groups:
            group = dist.new_group(ranks, timeout=JOIN_TIMEOUT)
            if topology.rank in ranks:
                own[axis] = group
    return own


def seed_everything(seed: int, topology: Topology, step: int = 0) -> None:
    """Seeds what draws random numbers in a step: dropout. Ranks that share their samples draw the same.

    The numbers of a step follow from the seed, the step and the place alone, so that no state has to be saved.
    """
    own = (seed * 1_000_003 + topology.data_rank * 7_919 + topology.stage * 104_729 + step * 15_485_863) % (1 << 63)
    random.seed(own)
    np.random.seed(own % (1 << 32))
    torch.manual_seed(own)


def _start_process_group(launch: Launch, device: torch.device, store: Store, timeout: timedelta) -> None:
    """torch's default group, and DeepSpeed's wrapper of it."""
    import deepspeed

    # NCCL makes its communicators at once when it knows the device; a world of one rank has no peer to reach.
    bound_device = device if device.type == "cuda" and launch.world_size > 1 else None
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=PrefixStore("process_group", store), rank=launch.rank, world_size=launch.world_size,
        timeout=timeout, device_id=bound_device,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def _log_world(topology: Topology, device: torch.device) -> None:
    """One line on rank 0: ranks, hosts, layout and devices. Every rank must call it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({os.cpu_count()} cores)"
    gathered: list[Any] = [None] * topology.world_size
    dist.all_gather_object(gathered, (socket.gethostname(), name))
    hosts, devices = (list(dict.fromkeys(column)) for column in zip(*gathered, strict=True))
    listed_hosts = ", ".join(hosts[:8]) + (", ..." if len(hosts) > 8 else "")
    log.info(
        "world: %s on %s (%s), pipeline %d x data %d x tensor %d, device %s",
        _with_noun(topology.world_size, "rank"),
        _with_noun(len(hosts), "host"),
        listed_hosts,
        topology.pipeline,
        topology.data,
        topology.tensor,
        ", ".join(devices),
    )


def _with_noun(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


@contextlib.contextmanager
def joined_world(
    launch: Launch,
    topology: Topology,
    store: Store | None = None,
    phases: Phases | None = None,
    *,
    seed: int,
    timeout: timedelta = JOIN_TIMEOUT,
) -> Iterator[World]:
    """Joins all processes into one world; leaves it at the end.

    Args:
        store: from `open_store`; opened here by default.
        phases: of this rank, from its watchdog. They set the timeouts of collectives from the first step on.
        patience: how long a rank waits for all to join; a host may have a corpus to tokenize first.
    """
    phases = Phases() if phases is None else phases
    phases.enter("join")
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 has renamed; the user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    device_type = local_device()
    if device_type == "cuda":
        torch.cuda.set_device(launch.local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // launch.local_world_size))
    complete_environment(launch)
    if launch.local_rank == 0:
        removed = remove_stale_buffers()
        if removed:
            log.info("removed %d shared-memory files that killed ranks had left", removed)
    if topology.tensor > launch.local_world_size:
        log.warning(
            "parallel.tensor = %d is more than the %d processes of a host: every layer's sums cross the network. "
            "Take at most %d, and more pipeline or data ranks",
            topology.tensor, launch.local_world_size, launch.local_world_size,
        )  # fmt: skip
    if device_type == "cpu":
        load_extension("ShareMemCommBuilder")
    device = torch.device(device_type, launch.local_rank) if device_type == "cuda" else torch.device("cpu")
    store = open_store(launch, timeout) if store is None else store
    _start_process_group(launch, device, store, timeout)
    if device_type == "cpu":
        unlink_shared_buffer(launch)
    _log_world(topology, device)
    phases.enter("build")
    seed_everything(seed, topology)
    yield World(topology, device, seed, store, _process_groups(topology), phases)
    # Not after an error: leaving the world would make the other ranks fail, and be ended, before this one has
    # said what was wrong.
    dist.destroy_process_group()
