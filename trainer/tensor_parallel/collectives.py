"""Collectives that know their gradient.

The tensor ranks of a group compute the same thing, except inside a *cut region*, where each rank holds a part of the
weights. Between the two lie conjugate pairs (Shoeybi et al. 2019, "Megatron-LM", section 3; Korthikanti et al. 2022,
"Reducing Activation Recomputation in Large Transformer Models", section 4.2.2):

| function           | forward        | backward       | where                                        |
| ------------------ | -------------- | -------------- | -------------------------------------------- |
| `enter`            | identity       | all-reduce     | into a cut region                            |
| `leave`            | all-reduce     | identity       | out of it                                    |
| `gather`           | all-gather     | own slice      | a cut result that every rank needs whole     |
| `split`            | own slice      | all-gather     | a whole input of which a rank needs its part |
| `gather_sequence`  | all-gather     | reduce-scatter | `enter`, when the sequence is cut outside    |
| `scatter_sequence` | reduce-scatter | all-gather     | `leave`, when the sequence is cut outside    |

All of them accept tensors that are not contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.distributed.collectives import Group, all_gather, all_reduce, own_slice, reduce_scatter


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return all_reduce(gradient, ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return all_gather(x, dim, group).contiguous()  # no view, so that it may be changed in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return own_slice(gradient, ctx.dim, ctx.group), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return own_slice(x, dim, group).clone()

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


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return all_gather(gradient, ctx.dim, ctx.group), None, None


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: list[int]) -> Tensor:
        return x.new_zeros(shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, None


def hand_over(x: Tensor, shape: list[int]) -> Tensor:
    """Zeros in the place of `x`, which goes another way: `x` gets no gradient here, and yet is passed in the backward
    pass, on which ZeRO-3 relies to gather the weights behind it."""
    result: Tensor = _HandOver.apply(x, shape)  # type: ignore[no-untyped-call]
    return result


def enter(x: Tensor, group: Group) -> Tensor:
    """`x` itself; its gradient is summed over the group."""
    result: Tensor = _Enter.apply(x, group)  # type: ignore[no-untyped-call]
    return result


def leave(x: Tensor, group: Group) -> Tensor:
    """The sum of `x` over the group; its gradient is already whole."""
    result: Tensor = _Leave.apply(x, group)  # type: ignore[no-untyped-call]
    return result


def gather(x: Tensor, dim: int, group: Group) -> Tensor:
    """All parts along `dim`, for use in a region where every rank computes the same."""
    result: Tensor = _Gather.apply(x, dim, group)  # type: ignore[no-untyped-call]
    return result


def split(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's part along `dim` of what every rank has whole."""
    result: Tensor = _Split.apply(x, dim, group)  # type: ignore[no-untyped-call]
    return result


def gather_sequence(x: Tensor, dim: int, group: Group) -> Tensor:
    """All parts along `dim`, for use in a cut region: the ranks' gradients are summed, each gets back its part."""
    result: Tensor = _GatherSequence.apply(x, dim, group)  # type: ignore[no-untyped-call]
    return result


def scatter_sequence(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's part along `dim` of the sum over the group."""
    result: Tensor = _ScatterSequence.apply(x, dim, group)  # type: ignore[no-untyped-call]
    return result
