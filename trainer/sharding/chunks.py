"""Stretches of a flattened weight as boxes of the whole weight: what makes a checkpoint independent of the layout."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from trainer.sharding.shard import Shard

Index = tuple[int, ...]


def chunks_of_flat_range(shape: Index, first: int, end: int) -> Iterator[tuple[Index, Index]]:
    """Elements `first` up to `end` of a tensor of `shape`, in row-major order, as boxes: (start, size).

    They come in order, and each is contiguous among the elements: at most 2 x dimensions - 1 of them.
    """
    if first >= end:
        return
    if not shape:
        yield (), ()
        return
    inner = math.prod(shape[1:])
    (row, begun), (last, ended) = divmod(first, inner), divmod(end, inner)
    if begun:
        upto = min(inner, begun + end - first)
        yield from _in_row(row, shape, begun, upto)
        if row == last or upto < inner:
            return
        row += 1
    if row < last:
        yield (row, *(0 for _ in shape[1:])), (last - row, *shape[1:])
    if ended:
        yield from _in_row(last, shape, 0, ended)


def _in_row(row: int, shape: Index, first: int, end: int) -> Iterator[tuple[Index, Index]]:
    for start, size in chunks_of_flat_range(shape[1:], first, end):
        yield (row, *start), (1, *size)


def chunks_of_fragment(flat: Tensor, first: int, shard: Shard) -> Iterator[tuple[Index, Tensor]]:
    """A stretch of what this rank holds of a weight, as boxes of the whole weight: (start in the whole, view).

    Padding, which lies behind the end of the whole, is left out.

    Args:
        flat: one-dimensional; its elements are those from `first` on of this rank's part, flattened.
    """
    done = 0
    for start, size in chunks_of_flat_range(shard.local_shape(), first, first + flat.numel()):
        count = math.prod(size)
        box = flat[done : done + count].view(size)
        done += count
        if not size:
            yield (), box
            continue
        yield from _in_full_tensor(start, box, shard)


def chunks_of_shard(part: Tensor, shard: Shard) -> Iterator[tuple[Index, Tensor]]:
    """The same for all that this rank holds of a tensor, which need not be contiguous."""
    yield from _in_full_tensor((0,) * part.ndim, part, shard) if part.ndim else [((), part)]


def _in_full_tensor(start: Index, box: Tensor, shard: Shard) -> Iterator[tuple[Index, Tensor]]:
    low, high = start[shard.dim], start[shard.dim] + box.shape[shard.dim]
    for here, there in shard.ranges():
        begin, stop = max(low, here.start), min(high, here.stop)
        if begin < stop:
            whole_start = list(start)
            whole_start[shard.dim] = there.start + begin - here.start
            yield tuple(whole_start), box.narrow(shard.dim, begin - low, stop - begin)
