"""The grid of parallel axes: arithmetic, and agreement with DeepSpeed's topology."""

from __future__ import annotations

import itertools

import pytest

from trainer.topology import AXES, Axis, Topology

pytestmark = pytest.mark.fast

GRIDS = [(1, 1, 1), (2, 3, 4), (4, 1, 2), (1, 8, 1), (3, 2, 1), (2, 2, 2)]
SIX_AXES = {"replica": 2, "pipeline": 2, "data": 3, "context": 2, "expert": 2, "tensor": 2}


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_topology_agrees_with_deepspeed(grid: tuple[int, int, int]) -> None:
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    pipeline, data, tensor = grid
    theirs = PipeModelDataParallelTopology(num_pp=pipeline, num_mp=tensor, num_dp=data)
    names: dict[Axis, str] = {"pipeline": "pipe", "data": "data", "tensor": "model"}
    for rank in range(pipeline * data * tensor):
        topology = Topology.of(pipeline * data * tensor, rank, pipeline=pipeline, tensor=tensor)
        coordinate = theirs.get_coord(rank)
        assert topology.pipeline_rank == coordinate.pipe
        assert topology.data_rank == coordinate.data
        assert topology.tensor_rank == coordinate.model
        for axis, name in names.items():
            if topology.size(axis) > 1:
                assert topology.groups_of(axis) == sorted(theirs.get_axis_comm_lists(name))


@pytest.mark.parametrize("axes", [*((axis,) for axis in AXES), ("replica", "data"), ("tensor", "pipeline"), AXES])
def test_groups_partition_the_world(axes: tuple[Axis, ...]) -> None:
    topology = Topology(0, **SIX_AXES)
    groups = topology.groups_of(*axes)
    assert sorted(itertools.chain(*groups)) == list(range(topology.world_size))
    assert all(len(group) == topology.size(*axes) for group in groups)


@pytest.mark.parametrize("axes", [*((axis,) for axis in AXES), ("data", "expert"), ("expert", "data")])
def test_ranks_of_differ_in_their_axes_only(axes: tuple[Axis, ...]) -> None:
    for rank in (0, 17, 95):
        topology = Topology(rank, **SIX_AXES)
        ranks = topology.ranks_of(*axes)
        assert ranks[topology.coordinate(*axes)] == rank
        for index, other in enumerate(Topology(rank, **SIX_AXES) for rank in ranks):
            assert other.coordinate(*axes) == index
            assert all(other.coordinate(axis) == topology.coordinate(axis) for axis in AXES if axis not in axes)


def test_slowest_axis_is_replica_and_fastest_is_tensor() -> None:
    topology = Topology(0, **SIX_AXES)
    assert topology.ranks_of("tensor") == [0, 1]
    assert topology.ranks_of("expert") == [0, 2]
    assert topology.ranks_of("replica") == [0, 48]
    assert topology.ranks_of("data", "expert") == [0, 2, 8, 10, 16, 18]


def test_shares_samples_lists_axes_of_more_than_one_rank() -> None:
    assert Topology(0, data=2).shares_samples() == ()
    assert Topology(0, replica=2, pipeline=2, expert=2, tensor=2).shares_samples() == ("pipeline", "tensor")
    assert Topology(0, **SIX_AXES).shares_samples() == ("pipeline", "context", "tensor")


def test_inside_replica_keeps_the_coordinates_of_all_other_axes() -> None:
    for rank in (0, 47, 48, 95):
        topology = Topology(rank, **SIX_AXES)
        inner = topology.inside_replica()
        assert inner.world_size == topology.world_size // 2
        assert inner.coordinate("replica") == 0
        assert all(inner.coordinate(axis) == topology.coordinate(axis) for axis in AXES if axis != "replica")


@pytest.mark.parametrize(("world_size", "pipeline", "tensor"), [(4, 3, 1), (6, 2, 2), (0, 1, 1)])
def test_topology_rejects_sizes_that_do_not_divide(world_size: int, pipeline: int, tensor: int) -> None:
    with pytest.raises(ValueError):
        Topology.of(world_size, 0, pipeline=pipeline, tensor=tensor)


def test_topology_rejects_a_rank_outside_of_the_world() -> None:
    with pytest.raises(ValueError, match="rank 4 is outside a world of 4"):
        Topology(4, data=4)
