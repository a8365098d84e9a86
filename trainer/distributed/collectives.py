"""Plain collectives on tensors, without a gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any
"""A process group; None stands for all ranks."""


def all_reduce(tensor: Tensor, group: Group, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """The sum over the group, as a new tensor."""
    reduced = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(reduced, op=op, group=group)
    return reduced


def all_gather(tensor: Tensor, dim: int, group: Group) -> Tensor:
    """Every rank's part, joined along `dim` in the order of ranks; the parts are equally large."""
    size = dist.get_world_size(group)
    own = tensor.detach().movedim(dim, 0).contiguous()
    joined = own.new_empty((size * own.shape[0], *own.shape[1:]))
    dist.all_gather_into_tensor(joined, own, group=group)
    return _moved(joined, dim)


def _moved(tensor: Tensor, dim: int) -> Tensor:
    """With its first dimension at `dim`, in memory of its own: users view it, and change it in place."""
    return tensor if dim == 0 else tensor.movedim(0, dim).clone(memory_format=torch.contiguous_format)


def reduce_scatter(tensor: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's part, along `dim`, of the sum over the group."""
    size = dist.get_world_size(group)
    whole = tensor.detach().movedim(dim, 0).contiguous()
    own = whole.new_empty((whole.shape[0] // size, *whole.shape[1:]))
    dist.reduce_scatter_tensor(own, whole, group=group)
    return _moved(own, dim)


def local_slice(tensor: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's of equal parts along `dim`."""
    return tensor.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)]
