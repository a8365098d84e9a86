"""The rank grid, against DeepSpeed's own."""

from __future__ import annotations

import itertools

import pytest

from trainer.topology import Topology

pytestmark = pytest.mark.fast

GRIDS = [(1, 1, 1), (2, 3, 4), (4, 1, 2), (1, 8, 1), (3, 2, 1), (2, 2, 2)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_topology_agrees_with_deepspeed(grid: tuple[int, int, int]) -> None:
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    pipeline, data, tensor = grid
    theirs = PipeModelDataParallelTopology(num_pp=pipeline, num_mp=tensor, num_dp=data)
    for rank in range(pipeline * data * tensor):
        topology = Topology.of(pipeline * data * tensor, rank, pipeline=pipeline, tensor=tensor)
        coordinate = theirs.get_coord(rank)
        assert (topology.stage, topology.data_rank, topology.tensor_rank) == (
            coordinate.pipe,
            coordinate.data,
            coordinate.model,
        )
        for ours, name in (("pipeline", "pipe"), ("data", "data"), ("tensor", "model")):
            assert (
                sorted(topology.groups(ours)) == sorted(theirs.get_axis_comm_lists(name))
                or len(topology.groups(ours)[0]) == 1
            )


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_topology_groups_partition_the_world(grid: tuple[int, int, int]) -> None:
    pipeline, data, tensor = grid
    topology = Topology(0, pipeline, data, tensor)
    for axis in ("pipeline", "data", "tensor"):
        members = list(itertools.chain(*topology.groups(axis)))
        assert sorted(members) == list(range(topology.world_size))
    for rank in range(topology.world_size):
        own = Topology(rank, pipeline, data, tensor)
        assert set(own.group("data")) & set(own.group("tensor")) & set(own.group("pipeline")) == {rank}


@pytest.mark.parametrize(("world", "pipeline", "tensor"), [(4, 3, 1), (6, 2, 2), (0, 1, 1)])
def test_topology_rejects_sizes_that_do_not_divide(world: int, pipeline: int, tensor: int) -> None:
    with pytest.raises(ValueError):
        Topology.of(world, 0, pipeline=pipeline, tensor=tensor)
