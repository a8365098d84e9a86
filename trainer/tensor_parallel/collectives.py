"""Collectives with a gradient, in conjugate pairs.

The tensor ranks of a group compute the same values, except inside a *tensor-parallel region*, where each rank has a
shard of the weights. At the border between the two a forward collective has its conjugate in the backward pass (Shoeybi
et al. 2019, "Megatron-LM", section 3; Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer
Models", section 4.2.2):

| function                  | forward        | backward       | where                                           |
| ------------------------- | -------------- | -------------- | ----------------------------------------------- |
| `enter_region`            | identity       | all-reduce     | into a region                                   |
| `reduce_from_region`      | all-reduce     | identity       | out of it                                       |
| `gather_from_region`      | all-gather     | local slice    | a sharded result that every rank needs in full  |
| `split_to_region`         | local slice    | all-gather     | a full input of which a rank needs its part     |
| `gather_sequence`         | all-gather     | reduce-scatter | into a region, from a sharded sequence          |
| `reduce_scatter_sequence` | reduce-scatter | all-gather     | out of a region, to a sharded sequence          |

All of them take tensors of any shape, which need not be contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from trainer.distributed.collectives import Group, all_gather, all_reduce, local_slice, reduce_scatter


class _Context(FunctionCtx):
    """Context from the forward pass of a collective to its backward pass."""

    group: Group
    dim: int


class _EnterRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return all_reduce(gradient, ctx.group), None


class _ReduceFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, group: Group) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None


class _GatherFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return all_gather(x, dim, group).contiguous()  # not a view: it may be changed in place

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return local_slice(gradient, ctx.dim, ctx.group), None, None


class _SplitToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return local_slice(x, dim, group).clone()

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return all_gather(gradient, ctx.dim, ctx.group), None, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return reduce_scatter(gradient, ctx.dim, ctx.group), None, None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return all_gather(gradient, ctx.dim, ctx.group), None, None


class _DeferReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, shape: list[int]) -> Tensor:
        return x.new_zeros(shape)

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None


def defer_reduce(x: Tensor, shape: list[int]) -> Tensor:
    """Return zeros of `shape` instead of `x`, which is summed later, with the output of another layer.

    `x` gets no gradient here. It is part of the backward graph nevertheless, because ZeRO-3 gathers the weights that
    `x` was computed from when the backward pass reaches it.
    """
    result: Tensor = _DeferReduce.apply(x, shape)  # type: ignore[no-untyped-call]
    return result


def enter_region(x: Tensor, group: Group) -> Tensor:
    """Return `x`; collective in the backward pass, which sums its gradient over the group."""
    result: Tensor = _EnterRegion.apply(x, group)  # type: ignore[no-untyped-call]
    return result


def reduce_from_region(x: Tensor, group: Group) -> Tensor:
    """Return the sum of `x`; its gradient is full already. Collective: all ranks of the group must call it."""
    result: Tensor = _ReduceFromRegion.apply(x, group)  # type: ignore[no-untyped-call]
    return result


def gather_from_region(x: Tensor, dim: int, group: Group) -> Tensor:
    """Return all parts along `dim`. Collective: all ranks of the group must call it.

    The result is used where every rank computes the same, so that each part's gradient is a slice of the result's.
    """
    result: Tensor = _GatherFromRegion.apply(x, dim, group)  # type: ignore[no-untyped-call]
    return result


def split_to_region(x: Tensor, dim: int, group: Group) -> Tensor:
    """Return this rank's part along `dim` of a full tensor; collective in the backward pass, which gathers them."""
    result: Tensor = _SplitToRegion.apply(x, dim, group)  # type: ignore[no-untyped-call]
    return result


def gather_sequence(x: Tensor, dim: int, group: Group) -> Tensor:
    """Return all parts along `dim`. Collective: all ranks of the group must call it.

    The result is used inside a region, where each rank has a partial gradient: they are summed and scattered.
    """
    result: Tensor = _GatherSequence.apply(x, dim, group)  # type: ignore[no-untyped-call]
    return result


def reduce_scatter_sequence(x: Tensor, dim: int, group: Group) -> Tensor:
    """Return this rank's part, along `dim`, of the sum. Collective: all ranks of the group must call it."""
    result: Tensor = _ReduceScatterSequence.apply(x, dim, group)  # type: ignore[no-untyped-call]
    return result
