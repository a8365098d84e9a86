"""Shards cover each tensor once, along one dimension or several; their chunks are where they say, and they join."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tools.ranks import run_ranks
from trainer.distributed import Launch, joined_world
from trainer.sharding import DimShard, Joiner, Shard, chunks_of_fragment, chunks_of_shard
from trainer.tensor_parallel.units import ResolvedPart, Share
from trainer.topology import Topology


def _random_parts(draw: random.Random) -> tuple[tuple[int, ...], int, int, list[ResolvedPart]]:
    """Return a weight's shape, the dimension that is sharded, the ranks, and the parts it consists of."""
    ranks = draw.choice([1, 2, 3, 4, 8])
    parts = []
    for _ in range(draw.randint(1, 4)):
        shared = draw.random() < 0.4
        divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
        units = draw.choice(divisors) if shared else ranks * draw.randint(1, 3)
        parts.append(ResolvedPart(units * draw.randint(1, 3), units, shared))
    dim, rest = draw.randrange(3), [draw.randint(1, 4) for _ in range(2)]
    shape = [*rest[:dim], sum(part.size for part in parts), *rest[dim:]]
    return tuple(shape), dim, ranks, parts


def _shards(shape: tuple[int, ...], dim: int, ranks: int, rank: int, parts: list[ResolvedPart]) -> list[Shard]:
    """Return one shard for each part, or for neighboring parts of which the rank has the same share."""
    groups: list[tuple[Share, list[int], int]] = []
    start = 0
    for part in parts:
        share = part.share(rank, ranks)
        if groups and groups[-1][0] == share:
            groups[-1][1].append(part.size)
        else:
            groups.append((share, [part.size], start))
        start += part.size
    return [
        Shard(
            "w",
            shape,
            (DimShard(dim, share.index, share.count, tuple(sizes), start=start),),
            owner=share.owner,
            copies=share.copies,
        )
        for share, sizes, start in groups
    ]


@pytest.mark.fast
def test_shards_cover_every_weight_once() -> None:
    draw = random.Random(1)
    for _ in range(400):
        shape, dim, ranks, parts = _random_parts(draw)
        full = torch.arange(float(math.prod(shape))).reshape(shape)
        covered, joined, local_sizes = torch.zeros(shape, dtype=torch.int), torch.full(shape, torch.nan), Counter()
        for rank in range(ranks):
            for number, shard in enumerate(_shards(shape, dim, ranks, rank, parts)):
                local = shard.extract(full)
                assert tuple(local.shape) == shard.local_shape()
                assert local.data_ptr() != full.data_ptr()
                local_sizes[number, local.shape[dim]] += 1
                for local_index, full_index in shard.blocks():
                    covered[full_index] += shard.owner
                    assert torch.equal(local[local_index], full[full_index])
                shard.insert(local, joined)
        assert torch.equal(joined, full)
        assert (covered == 1).all()
        assert set(local_sizes.values()) == {ranks}, "ranks hold shards of different sizes"


@pytest.mark.fast
def test_padded_shards_cover_every_row_once() -> None:
    for size, ranks, dim in itertools.product((1, 2, 5, 10, 16, 259), (1, 2, 3, 4, 8), (0, 1)):
        shape = (size, 3) if dim == 0 else (3, size)
        full = torch.randn(shape)
        joined, covered = torch.full(shape, torch.nan), torch.zeros(size, dtype=torch.int)
        for rank in range(ranks):
            part = DimShard(dim, rank, ranks, (size,))
            shard = Shard("w", shape, (part,))
            local = shard.extract(full)
            assert tuple(local.shape) == shard.local_shape()
            assert local.shape[dim] == -(-size // ranks)
            ((local_range, full_range),) = part.ranges()
            covered[full_range] += 1
            assert not local.narrow(dim, local_range.stop, local.shape[dim] - local_range.stop).any(), "padding is zero"
            shard.insert(local + 0.0, joined)
        assert torch.equal(joined, full)
        assert (covered == 1).all()


@pytest.mark.fast
def test_full_shard_is_the_tensor_itself() -> None:
    for shape in ((), (3,), (2, 5)):
        shard = Shard.full("w", shape, owner=True)
        full, joined = torch.randn(shape), torch.full(shape, torch.nan)
        assert shard.is_full
        assert shard.local_shape() == shape
        ((offsets, chunk),) = chunks_of_shard(full, shard)
        assert (offsets, chunk.shape) == ((0,) * len(shape), full.shape)
        shard.insert(shard.extract(full), joined)
        assert torch.equal(joined, full)


SHAPE = (6, 10, 3)
"""Of experts' weights: experts, two matrices of 4 and 6 rows, columns."""


def _expert_shard(expert: int, tensor: int, *, experts: int = 3, tensors: int = 2) -> Shard:
    """Return the shard at one coordinate: dimension 0 by one axis, each matrix of dimension 1 by another."""
    slices = (DimShard(0, expert, experts, (6,), axis="expert"), DimShard(1, tensor, tensors, (4, 6)))
    return Shard("experts", SHAPE, slices)


def _is_full_of(full: Tensor, chunks: Iterator[tuple[tuple[int, ...], Tensor]], counts: Tensor) -> bool:
    """Count each element that the chunks hold; return whether all are where their offsets say."""
    is_right = True
    for offsets, view in chunks:
        index = tuple(slice(first, first + size) for first, size in zip(offsets, view.shape, strict=True))
        is_right = is_right and view.equal(full[index])
        counts[index] += 1
    return is_right


@pytest.mark.fast
def test_shard_of_two_axes_is_the_product_of_its_slices() -> None:
    shard = _expert_shard(2, 1)
    assert shard.local_shape() == (2, 5, 3)
    assert not shard.is_full
    assert shard.covers_full_tensor
    rows = slice(4, 6)
    assert [full for _, full in shard.blocks()] == [
        (rows, slice(2, 4), slice(0, 3)),
        (rows, slice(7, 10), slice(0, 3)),
    ]
    full = torch.arange(math.prod(SHAPE)).view(SHAPE)
    assert shard.extract(full).equal(full[4:6][:, [2, 3, 7, 8, 9]])
    assert shard.along("expert") == shard.slices[0]
    assert shard.along("pipeline") is None
    assert shard.replica_count(2) == 1
    assert Shard("experts", SHAPE, shard.slices[:1]).replica_count(2) == 2, "tensor ranks hold the same experts"


@pytest.mark.fast
@pytest.mark.parametrize(("experts", "tensors"), [(3, 2), (2, 1), (1, 2), (4, 2), (2, 3)])
def test_chunks_of_two_axes_cover_the_tensor_once(experts: int, tensors: int) -> None:
    """Also where the last ranks of an axis hold padding."""
    full = torch.arange(1, 1 + math.prod(SHAPE)).view(SHAPE)
    by_shard, by_fragment = torch.zeros(SHAPE, dtype=torch.int), torch.zeros(SHAPE, dtype=torch.int)
    draw = random.Random(0)
    for expert, tensor in itertools.product(range(experts), range(tensors)):
        shard = _expert_shard(expert, tensor, experts=experts, tensors=tensors)
        local = shard.extract(full)
        assert _is_full_of(full, chunks_of_shard(local, shard), by_shard)
        flat = local.reshape(-1)
        middle = draw.randint(0, flat.numel())
        for first, end in ((0, middle), (middle, flat.numel())):
            assert _is_full_of(full, chunks_of_fragment(flat[first:end], first, shard), by_fragment)
    assert (by_shard == 1).all()
    assert (by_fragment == 1).all()


def save_and_join() -> bool:
    """Save the chunks of a tensor that two axes slice, read them into a full tensor, and join the shards to another."""
    launch = Launch.from_environment()
    with joined_world(launch, Topology.of(launch.world_size, launch.rank, tensor=2, expert=2), seed=1) as world:
        topology = world.topology
        shard = _expert_shard(topology.coordinate("expert"), topology.tensor_rank, experts=2)
        full = torch.arange(float(math.prod(SHAPE))).view(SHAPE)
        local = shard.extract(full)
        chunks = [(offsets, view.clone()) for offsets, view in chunks_of_fragment(local.reshape(-1), 0, shard)]
        every: list[list[tuple[tuple[int, ...], Tensor]]] = [[] for _ in range(launch.world_size)]
        torch.distributed.all_gather_object(every, chunks)
        counts = torch.zeros(SHAPE, dtype=torch.int)
        are_right = all(_is_full_of(full, iter(chunks), counts) for chunks in every)
        ((name, joined),) = Joiner(world.groups.of).add("unused", local, shard)
        return are_right and bool((counts == 1).all()) and name == "experts" and joined.equal(full)


def test_tensor_of_two_axes_is_saved_and_joined() -> None:
    assert run_ranks(save_and_join, 4) == [True] * 4


def join_parts() -> bool:
    """Join a fused tensor whose matrices lie in two parameters, one of which two of four ranks share."""
    launch = Launch.from_environment()
    with joined_world(launch, Topology.of(launch.world_size, launch.rank, tensor=4), seed=1) as world:
        full = torch.arange(36.0).view(12, 3)
        rank = world.topology.tensor_rank
        shards = _shards((12, 3), 0, 4, rank, [ResolvedPart(8, 4, False), ResolvedPart(4, 2, True)])
        joiner = Joiner(world.groups.of)
        first, last = (list(joiner.add("unused", shard.extract(full), shard)) for shard in shards)
        return first == [] and last[0][0] == "w" and last[0][1].equal(full)


def test_tensor_in_several_parameters_joins_with_its_last() -> None:
    assert run_ranks(join_parts, 4) == [True] * 4


@pytest.mark.fast
def test_overlaps_of_chunks_make_up_the_shard() -> None:
    """A shard of two axes is filled from any chunks that make up the full tensor, and padding stays as it was."""
    full = torch.arange(1, 1 + math.prod(SHAPE)).view(SHAPE)
    borders = [(0, 1, 4, 6), (0, 3, 7, 10), (0, 2, 3)]
    ranges = [list(itertools.pairwise(cuts)) for cuts in borders]
    for expert, tensor in itertools.product(range(4), range(2)):
        shard = _expert_shard(expert, tensor, experts=4)
        local = torch.zeros(shard.local_shape(), dtype=full.dtype)
        for chunk_range in itertools.product(*ranges):
            chunk = full[tuple(slice(*ends) for ends in chunk_range)]
            offsets = [first for first, _ in chunk_range]
            for local_index, chunk_index in shard.overlaps(offsets, chunk.shape):
                assert not local[local_index].any(), "each element once"
                local[local_index] = chunk[chunk_index]
        assert local.equal(shard.extract(full))
