"""A joined world as one rank sees it: its topology, device, process groups and seeds."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.distributed import Store

from trainer.distributed.groups import ProcessGroups
from trainer.distributed.phases import Phases
from trainer.topology import Topology


@dataclass(frozen=True)
class World:
    """A joined world, as one rank sees it."""

    topology: Topology
    """Topology of this rank's replica, numbered as torch's default process group."""

    full_topology: Topology
    """Topology of all replicas, numbered as the launcher does. Equal to `topology` where there is one replica."""

    device: torch.device
    seed: int
    """`run.seed`."""

    store: Store
    """Key-value store of all ranks, for everything that must not wait for a collective. See `open_store`."""

    groups: ProcessGroups
    phases: Phases = field(default_factory=Phases)
    """Current phase of this rank, for the watchdog."""

    @property
    def is_rank_zero(self) -> bool:
        """True on the one rank that writes the outputs of the run: events, metrics, the console."""
        return self.full_topology.rank == 0

    def seed_step(self, step: int) -> None:
        """Seed the random numbers of a step; see `seed_everything`."""
        seed_everything(self.seed, self.full_topology, step)


def seed_everything(seed: int, topology: Topology, step: int = 0) -> None:
    """Seed the random numbers of a step, such as those of dropout.

    Tensor ranks draw the same numbers, since they compute parts of the same activations. All other coordinates are part
    of the seed: stages compute other layers, the other axes other tokens. The numbers follow from the seed, the step
    and the coordinates alone, so that a checkpoint need not store any state of generators.

    Args:
        seed: `run.seed`.
        topology: Topology of all replicas.
        step: The step that begins; 0 before training.
    """
    offsets = (
        (topology.coordinate("data"), 7_919),
        (topology.coordinate("pipeline"), 104_729),
        (step, 15_485_863),
        (topology.coordinate("replica"), 1_299_709),
        (topology.coordinate("context"), 32_452_843),
        (topology.coordinate("expert"), 86_028_121),
    )
    combined = (seed * 1_000_003 + sum(value * prime for value, prime in offsets)) % (1 << 63)
    random.seed(combined)
    np.random.seed(combined % (1 << 32))
    torch.manual_seed(combined)
