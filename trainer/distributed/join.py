"""Joining all processes into one world, and leaving it."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import warnings
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from trainer.compat import check_names
from trainer.compat.torch.names import PROCESS_GROUPS, TORCH
from trainer.distributed.environment import Launch, complete_environment, local_device
from trainer.distributed.extensions import load_extension
from trainer.distributed.groups import ProcessGroups
from trainer.distributed.phases import JOIN_TIMEOUT, Phases
from trainer.distributed.shared_memory import remove_stale_buffers, unlink_shared_buffer
from trainer.distributed.store import open_store
from trainer.distributed.world import World, seed_everything
from trainer.topology import AXES, Topology

log = logging.getLogger(__name__)


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
    """Join all processes into one world, and leave it at the end. Collective: all ranks must enter it.

    Args:
        launch: This process, as the launcher describes it.
        topology: Topology of all replicas.
        store: From `open_store`; opened here by default.
        phases: Phases of this rank, from its watchdog. They set the timeouts of collectives from the first step on.
        seed: `run.seed`.
        timeout: How long a rank waits for the others to join; another host may have a corpus to tokenize first.
    """
    phases = Phases() if phases is None else phases
    phases.enter("join")
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 has renamed; users cannot do anything about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    _prepare_host(launch, topology)
    device = _prepare_device(launch)
    store = open_store(launch, timeout) if store is None else store
    _init_process_group(topology, device, store, timeout)
    if device.type == "cpu":
        unlink_shared_buffer(launch)
    _log_world(topology, device)
    phases.enter("build")
    seed_everything(seed, topology)
    groups = ProcessGroups(topology, store)
    yield World(topology.inside_replica(), topology, device, seed, store, groups, phases)
    if topology.replica > 1:  # rank 0 hosts the store, and shares no collective with the other replicas
        dist.all_reduce(torch.zeros(1), group=groups.of(*AXES))
    # Not after an error: leaving the world would make the other ranks fail, and be killed by the launcher, before this
    # rank has printed the cause.
    dist.destroy_process_group()


def _prepare_host(launch: Launch, topology: Topology) -> None:
    complete_environment(launch)
    if launch.local_rank == 0:
        removed = remove_stale_buffers()
        if removed:
            log.info("removed %d shared-memory files of killed ranks", removed)
    if topology.tensor > launch.local_world_size:
        log.warning(
            "parallel.tensor: the all-reduces of every layer cross the network, because a host has fewer processes "
            "(got %d, and %d processes on this host). Use at most %d, and more pipeline or data ranks",
            topology.tensor,
            launch.local_world_size,
            launch.local_world_size,
        )


def _prepare_device(launch: Launch) -> torch.device:
    if local_device() == "cuda":
        torch.cuda.set_device(launch.local_rank)
        return torch.device("cuda", launch.local_rank)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // launch.local_world_size))
    load_extension("ShareMemCommBuilder")
    return torch.device("cpu")


def _init_process_group(topology: Topology, device: torch.device, store: Store, timeout: timedelta) -> None:
    """Initialize torch's default group with the ranks of one replica, and DeepSpeed's wrapper of it.

    DeepSpeed calls barriers and collectives on the default group, so each replica needs its own.
    Collective: all ranks must call it.
    """
    import deepspeed

    check_names(TORCH, PROCESS_GROUPS)

    replica = topology.inside_replica()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=PrefixStore(f"process_group/{topology.coordinate('replica')}", store),
        rank=replica.rank,
        world_size=replica.world_size,
        timeout=timeout,
        # NCCL creates its communicators at once if it knows the device; a single rank has no peer to reach.
        device_id=device if device.type == "cuda" and replica.world_size > 1 else None,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def _log_world(topology: Topology, device: torch.device) -> None:
    """Log ranks, hosts, layout and devices of a replica on its rank 0. Collective: all ranks must call it."""
    replica = topology.inside_replica()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({os.cpu_count()} cores)"
    gathered: list[tuple[str, str]] = [("", "")] * replica.world_size
    dist.all_gather_object(gathered, (socket.gethostname(), name))
    hosts, devices = (list(dict.fromkeys(column)) for column in zip(*gathered, strict=True))
    log.info(
        "world: %s on %s (%s), %s, device %s",
        _with_noun(topology.world_size, "rank"),
        _with_noun(len(hosts), "host"),
        ", ".join(hosts[:8]) + (", ..." if len(hosts) > 8 else ""),
        " x ".join(
            f"{axis} {topology.size(axis)}"
            for axis in AXES
            if axis in ("pipeline", "data", "tensor") or topology.size(axis) > 1
        ),
        ", ".join(devices),
    )


def _with_noun(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
