"""The rank grid, against DeepSpeed's own."""

from __future__ import annotations

import itertools

import pytest

from trainer.topology import Topology

pytestmark = pytest.mark.fast

GRIDS = [(1, 1, 1), (2, 3, 4), (4, 1, 2), (1, 8, 1), (3, 2, 1), (2, 2, 2)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_agrees_with_deepspeed(grid: tuple[int, int, int]) -> None:
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    pipeline, data, tensor = grid
    theirs = PipeModelDataParallelTopology(num_pp=pipeline, num_mp=tensor, num_dp=data)
    for rank in range(pipeline * data * tensor):
        place = Topology.of(pipeline * data * tensor, rank, pipeline=pipeline, tensor=tensor)
        coordinate = theirs.get_coord(rank)
        assert (place.stage, place.data_rank, place.tensor_rank) == (coordinate.pipe, coordinate.data, coordinate.model)
        for ours, name in (("pipeline", "pipe"), ("data", "data"), ("tensor", "model")):
            assert (
                sorted(place.groups(ours)) == sorted(theirs.get_axis_comm_lists(name))
                or len(place.groups(ours)[0]) == 1
            )


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_groups_partition_the_world(grid: tuple[int, int, int]) -> None:
    pipeline, data, tensor = grid
    place = Topology(0, pipeline, data, tensor)
    for axis in ("pipeline", "data", "tensor"):
        members = list(itertools.chain(*place.groups(axis)))
        assert sorted(members) == list(range(place.world))
    for rank in range(place.world):
        own = Topology(rank, pipeline, data, tensor)
        assert set(own.group("data")) & set(own.group("tensor")) & set(own.group("pipeline")) == {rank}


@pytest.mark.parametrize(("world", "pipeline", "tensor"), [(4, 3, 1), (6, 2, 2), (0, 1, 1)])
def test_refuses_what_does_not_divide(world: int, pipeline: int, tensor: int) -> None:
    with pytest.raises(ValueError):
        Topology.of(world, 0, pipeline=pipeline, tensor=tensor)
