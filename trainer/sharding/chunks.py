"""Fragments of a flattened shard as chunks of the full tensor: what makes a checkpoint independent of the layout.

A chunk is an n-dimensional block of a full tensor: its offsets and its sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from trainer.sharding.shard import Shard

Index = tuple[int, ...]


def chunks_of_flat_range(shape: Index, first: int, end: int) -> Iterator[tuple[Index, Index]]:
    """Yield elements `first` up to `end` of a tensor of `shape`, in row-major order, as blocks: (offsets, sizes).

    The blocks come in order and are contiguous in memory. There are at most 2 x dimensions - 1 of them: the rest of the
    first row, the complete rows, and the beginning of the last row, where the two incomplete rows divide further.
    """
    if first >= end:
        return
    if not shape:
        yield (), ()
        return
    row_numel = math.prod(shape[1:])
    (row, row_first), (last, last_end) = divmod(first, row_numel), divmod(end, row_numel)
    if row_first:
        row_end = min(row_numel, row_first + end - first)
        yield from _chunks_of_row(row, shape, row_first, row_end)
        if row == last or row_end < row_numel:
            return
        row += 1
    if row < last:
        yield (row, *(0 for _ in shape[1:])), (last - row, *shape[1:])
    if last_end:
        yield from _chunks_of_row(last, shape, 0, last_end)


def _chunks_of_row(row: int, shape: Index, first: int, end: int) -> Iterator[tuple[Index, Index]]:
    for offsets, sizes in chunks_of_flat_range(shape[1:], first, end):
        yield (row, *offsets), (1, *sizes)


def chunks_of_fragment(fragment: Tensor, first: int, shard: Shard) -> Iterator[tuple[Index, Tensor]]:
    """Yield a fragment of a flattened shard as chunks of the full tensor: (offsets in the full tensor, view).

    Padding is left out.

    Args:
        fragment: (elements): those from `first` on of this rank's shard, flattened.
        first: offset of the fragment in the flattened shard.
        shard: its record.
    """
    done = 0
    for offsets, sizes in chunks_of_flat_range(shard.local_shape(), first, first + fragment.numel()):
        numel = math.prod(sizes)
        yield from _in_full_tensor(offsets, fragment[done : done + numel].view(sizes), shard)
        done += numel


def chunks_of_shard(local: Tensor, shard: Shard) -> Iterator[tuple[Index, Tensor]]:
    """Yield all of a shard, `local` (`local_shape`), as chunks of the full tensor; it need not be contiguous."""
    yield from _in_full_tensor((0,) * local.ndim, local, shard)


def _in_full_tensor(offsets: Index, block: Tensor, shard: Shard) -> Iterator[tuple[Index, Tensor]]:
    """Intersect a block of the local shard with each block that is dense in the full tensor."""
    for local_index, full_index in shard.blocks():
        firsts = [max(begin, local.start) for begin, local in zip(offsets, local_index, strict=True)]
        lasts = [
            min(begin + size, local.stop) for begin, size, local in zip(offsets, block.shape, local_index, strict=True)
        ]
        if not all(first < last for first, last in zip(firsts, lasts, strict=True)):
            continue
        bounds = zip(firsts, lasts, offsets, strict=True)
        view = block[tuple(slice(first - begin, last - begin) for first, last, begin in bounds)]
        starts = zip(firsts, local_index, full_index, strict=True)
        yield tuple(full.start + first - local.start for first, local, full in starts), view
