"""Process groups by axis and by product of axes, and the random seeds of ranks."""

from __future__ import annotations

import pytest
import torch

from tests.harness import run_ranks
from trainer.distributed import (
    Launch,
    joined_world,
    seed_everything,
)
from trainer.topology import AXES, Axis, Topology

PRODUCTS: list[tuple[Axis, ...]] = [("pipeline", "tensor"), ("replica", "data"), AXES]


def _sums(sizes: dict[str, int]) -> dict[tuple[Axis, ...], int]:
    """Return the sum of the ranks in each group of this rank, by axes."""
    launch = Launch.from_environment()
    with joined_world(launch, Topology.of(launch.world_size, launch.rank, **sizes), seed=1) as world:
        sums = {}
        for axes in (*((axis,) for axis in AXES), *PRODUCTS):
            value = torch.tensor(launch.rank)
            torch.distributed.all_reduce(value, group=world.groups.of(*axes))
            sums[axes] = int(value)
    return sums


@pytest.mark.parametrize(
    "sizes",
    [{"pipeline": 2, "tensor": 2}, {"tensor": 4}, {}, {"replica": 2, "pipeline": 2}, {"replica": 2, "expert": 2}],
)
def test_process_groups_sum_over_their_axes(sizes: dict[str, int]) -> None:
    for rank, sums in enumerate(run_ranks(_sums, 8, sizes)):
        topology = Topology.of(8, rank, **sizes)
        assert sums == {axes: sum(topology.ranks_of(*axes)) for axes in sums}


@pytest.mark.fast
def test_seed_everything_is_equal_on_ranks_that_share_samples() -> None:
    def draw(rank: int, topology: Topology | None = None) -> float:
        seed_everything(7, topology or Topology.of(8, rank, tensor=2))
        return float(torch.rand(()))

    assert draw(0) == draw(1), "tensor ranks"
    assert len({draw(rank) for rank in (0, 2, 4, 6)}) == 4, "data ranks"
    topologies = [Topology(0), *(Topology(1, **{axis: 2}) for axis in AXES if axis != "tensor")]
    assert len({draw(0, topology) for topology in topologies}) == 6, "every other axis"
