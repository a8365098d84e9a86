"""Collectives on tensors, without gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None
"""A process group; None stands for torch's default group."""


def all_reduce(tensor: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Return the reduction over the group. Collective: all ranks of `group` must call it.

    Returns:
        A new tensor of the same shape.
    """
    reduced = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(reduced, op=op, group=group)
    return reduced


def all_gather(tensor: Tensor, dim: int, group: Group) -> Tensor:
    """Concatenate the tensors of all ranks along `dim`. Collective: all ranks of `group` must call it.

    Args:
        tensor: This rank's tensor, of the same shape on all ranks.
        dim: Dimension that grows by the size of the group.
        group: The ranks, whose order is that of the result.
    """
    size = dist.get_world_size(group)
    local = tensor.detach().movedim(dim, 0).contiguous()
    gathered = local.new_empty((size * local.shape[0], *local.shape[1:]))
    dist.all_gather_into_tensor(gathered, local, group=group)
    return _restore_dim(gathered, dim)


def reduce_scatter(tensor: Tensor, dim: int, group: Group) -> Tensor:
    """Return this rank's slice, along `dim`, of the sum over the group.

    Collective: all ranks of `group` must call it.

    Args:
        tensor: Summand of the full shape; `dim` must be divisible by the size of the group.
        dim: Dimension that is divided by the size of the group.
        group: The ranks, whose order is that of the slices.
    """
    size = dist.get_world_size(group)
    full = tensor.detach().movedim(dim, 0).contiguous()
    local = full.new_empty((full.shape[0] // size, *full.shape[1:]))
    dist.reduce_scatter_tensor(local, full, group=group)
    return _restore_dim(local, dim)


def local_slice(tensor: Tensor, dim: int, group: Group) -> Tensor:
    """Return this rank's slice along `dim`, which is divided evenly over the ranks of the group."""
    return tensor.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)]


def _restore_dim(tensor: Tensor, dim: int) -> Tensor:
    """Move the first dimension to `dim`. Returns contiguous memory, since callers view it and change it in place."""
    return tensor if dim == 0 else tensor.movedim(0, dim).clone(memory_format=torch.contiguous_format)
