"""Collectives that know their gradient.

The tensor ranks of a group compute the same thing, except inside a *cut region*, where each rank holds a part of the
weights. Between the two lie conjugate pairs (Shoeybi et al. 2019, "Megatron-LM", section 3; Korthikanti et al. 2022,
"Reducing Activation Recomputation in Large Transformer Models", section 4.2.2):

| function                  | forward        | backward       | where                                        |
| ------------------------- | -------------- | -------------- | -------------------------------------------- |
| `enter_region`            | identity       | all-reduce     | into a cut region                            |
| `reduce_from_region`      | all-reduce     | identity       | out of it                                    |
| `gather_from_region`      | all-gather     | own slice      | a cut result that every rank needs whole     |
| `split_to_region`         | own slice      | all-gather     | a whole input of which a rank needs its part |
| `gather_sequence`         | all-gather     | reduce-scatter | entrance, when the sequence is cut outside   |
| `reduce_scatter_sequence` | reduce-scatter | all-gather     | exit, when the sequence is cut outside       |

All of them accept tensors that are not contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.distributed.collectives import Group, all_gather, all_reduce, local_slice, reduce_scatter


class _EnterRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return all_reduce(gradient, ctx.group), None


class _ReduceFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


class _GatherFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return all_gather(x, dim, group).contiguous()  # no view, so that it may be changed in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return local_slice(gradient, ctx.dim, ctx.group), None, None


class _SplitToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return local_slice(x, dim, group).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return all_gather(gradient, ctx.dim, ctx.group), None, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return reduce_scatter(gradient, ctx.dim, ctx.group), None, None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return all_gather(gradient, ctx.dim, ctx.group), None, None


class _DeferReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: list[int]) -> Tensor:
        return x.new_zeros(shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, None


def defer_reduce(x: Tensor, shape: list[int]) -> Tensor:
    """Zeros in the place of `x`, which goes another way: `x` gets no gradient here, and yet is passed in the backward
    pass, on which ZeRO-3 relies to gather the weights behind it."""
    result: Tensor = _DeferReduce.apply(x, shape)  # type: ignore[no-untyped-call]
    return result


def enter_region(x: Tensor, group: Group) -> Tensor:
    """`x` itself; its gradient is summed over the group."""
    result: Tensor = _EnterRegion.apply(x, group)  # type: ignore[no-untyped-call]
    return result


def reduce_from_region(x: Tensor, group: Group) -> Tensor:
    """The sum of `x` over the group; its gradient is already whole."""
    result: Tensor = _ReduceFromRegion.apply(x, group)  # type: ignore[no-untyped-call]
    return result


def gather_from_region(x: Tensor, dim: int, group: Group) -> Tensor:
    """All parts along `dim`, for use in a region where every rank computes the same."""
    result: Tensor = _GatherFromRegion.apply(x, dim, group)  # type: ignore[no-untyped-call]
    return result


def split_to_region(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's part along `dim` of what every rank has whole."""
    result: Tensor = _SplitToRegion.apply(x, dim, group)  # type: ignore[no-untyped-call]
    return result


def gather_sequence(x: Tensor, dim: int, group: Group) -> Tensor:
    """All parts along `dim`, for use in a cut region: the ranks' gradients are summed, each gets back its part."""
    result: Tensor = _GatherSequence.apply(x, dim, group)  # type: ignore[no-untyped-call]
    return result


def reduce_scatter_sequence(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's part along `dim` of the sum over the group."""
    result: Tensor = _ReduceScatterSequence.apply(x, dim, group)  # type: ignore[no-untyped-call]
    return result
