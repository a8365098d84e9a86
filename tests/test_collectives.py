"""Collectives and their gradients, against the same computation on one rank."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.harness import run_ranks
from tests.tensor_parallel_helpers import single_tensor_group
from trainer.distributed import World
from trainer.tensor_parallel import collectives


@dataclass(frozen=True)
class Pair:
    """A collective of `trainer.tensor_parallel.collectives`, and its result on all ranks."""

    name: str
    expected_outputs: Callable[[list[Tensor], int], list[Tensor]]
    """From the inputs of all ranks to the outputs of all ranks."""

    same_input: bool = False
    same_output: bool = False
    along: bool = True
    """Whether it takes a dimension."""


def _parts(x: Tensor, dim: int, count: int) -> list[Tensor]:
    return list(x.chunk(count, dim))


PAIRS = [
    Pair("enter_region", lambda xs, dim: xs, same_input=True, along=False),
    Pair("reduce_from_region", lambda xs, dim: [sum(xs[1:], xs[0])] * len(xs), same_output=True, along=False),
    Pair("gather_from_region", lambda xs, dim: [torch.cat(xs, dim)] * len(xs), same_output=True),
    Pair("split_to_region", lambda xs, dim: _parts(xs[0], dim, len(xs)), same_input=True),
    Pair("gather_sequence", lambda xs, dim: [torch.cat(xs, dim)] * len(xs)),
    Pair("reduce_scatter_sequence", lambda xs, dim: _parts(sum(xs[1:], xs[0]), dim, len(xs))),
]


LAYOUTS = ("contiguous", "transposed", "strided")


def _with_layout(values: Tensor, layout: str) -> Tensor:
    """Return a copy whose memory is contiguous, transposed, or strided."""
    if layout == "contiguous":
        return values.clone(memory_format=torch.contiguous_format)
    if layout == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    return torch.stack([values, values], -1)[..., 0]


def compare_collective(pair: Pair, dim: int, layout: str, gradient_layout: str, world: World) -> None:
    """Compare a rank's output and gradient with `pair.expected_outputs`; the inputs must not change."""
    rank, ranks, group = world.topology.rank, world.topology.world_size, world.groups.of("tensor")
    what = f"{pair.name}, dim {dim}, {layout}, gradient {gradient_layout}"

    def same(a: Tensor | None, b: Tensor | None) -> None:
        torch.testing.assert_close(a, b, msg=lambda m: f"{what}: {m}")

    generator = torch.Generator().manual_seed(7)
    inputs = [torch.randn(4, 8, 12, generator=generator).requires_grad_() for _ in range(ranks)]
    inputs = [inputs[0]] * ranks if pair.same_input else inputs
    expected = pair.expected_outputs(inputs, dim)
    output_gradients = [torch.randn(expected[0].shape, generator=generator) for _ in range(ranks)]
    if gradient_layout == "expanded":
        output_gradients = [s[:1, :1, :1].expand_as(s) for s in output_gradients]
    if pair.same_output:  # used once by all
        output_gradients = [output_gradients[0]] * ranks
        expected[0].backward(output_gradients[0])
    else:
        torch.autograd.backward(expected, output_gradients)
    x = _with_layout(inputs[rank].detach(), layout).requires_grad_()
    y = getattr(collectives, pair.name)(x, *([dim] if pair.along else []), group)
    same(y, expected[rank])
    if pair.name != "enter_region":
        assert x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr(), f"{what}: the input's own memory"
        y.add_(1.0)
    output_gradient = (
        output_gradients[rank]
        if gradient_layout == "expanded"
        else _with_layout(output_gradients[rank], gradient_layout)
    )
    before = output_gradient.clone()
    y.backward(output_gradient)
    same(x.grad, inputs[rank].grad)
    same(output_gradient, before)
    same(x, inputs[rank])


def compare_collectives(names: list[str]) -> int:
    """Compare each collective in every layout of its input and its gradient; return the number of comparisons."""
    checked = 0
    with single_tensor_group() as world:
        for pair in (p for p in PAIRS if p.name in names):
            dims = (0, 1, -1) if pair.along else (0,)
            for case in itertools.product(dims, LAYOUTS, ("contiguous", "transposed", "expanded")):
                compare_collective(pair, *case, world)
                checked += 1
    return checked


@pytest.mark.parametrize("ranks", [2, 4])
def test_collectives_match_their_definition(ranks: int) -> None:
    names = [pair.name for pair in PAIRS]
    assert run_ranks(compare_collectives, ranks, names) == [2 * 9 + 4 * 27] * ranks


def sum_a_copy(names: list[str]) -> int:
    def all_reduce(tensor: Tensor, group: Any) -> Tensor:
        reduced = tensor.detach().clone()
        dist.all_reduce(reduced.contiguous(), group=group)
        return reduced

    collectives.all_reduce = all_reduce
    return compare_collectives(names)


@pytest.mark.parametrize("name", ["enter_region", "reduce_from_region"])
def test_lost_sum_is_detected(name: str) -> None:
    with pytest.raises(AssertionError, match=f"{name}, dim 0, (transposed|contiguous, gradient transposed)"):
        run_ranks(sum_a_copy, 2, [name])
