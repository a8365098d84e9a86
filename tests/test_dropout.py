"""Random numbers: alike where ranks compute the same, apart where they do not, the same when a block is made anew."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from tests.harness import run_ranks
from tests.tensor_parallel_helpers import cut, gather_from_ranks, single_tensor_group
from tools.parity.shrink import tiny
from trainer.distributed import World
from trainer.errors import PlanError
from trainer.tasks.cross_entropy import VocabularyCrossEntropy
from trainer.tensor_parallel.region import Region

DROPPING: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"attn_pdrop": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.2}),
    "llama": ("llama", {"attention_dropout": 0.2}),
    "gptj": ("gptj", {"attn_pdrop": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.2}),
}


@dataclass
class Step:
    """What a forward and a backward pass leave."""

    loss: Tensor
    gradients: dict[str, Tensor]
    hidden: list[Tensor]
    """Behind each block."""

    masks: dict[str, list[Tensor]]
    """What dropout kept, in attention (`apart`) and on hidden states (`together`), in the order of the forward pass."""

    state: Tensor
    """Of the generator, afterwards."""


@contextlib.contextmanager
def recorded_dropout() -> Iterator[dict[str, list[Tensor]]]:
    masks: dict[str, list[Tensor]] = {"apart": [], "together": []}
    plain = F.dropout

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return plain(x, p, training, inplace)
        kept = plain(torch.ones_like(x), p)
        masks["apart" if x.ndim == 4 else "together"].append(kept != 0)
        return x * kept

    F.dropout = dropout
    try:
        yield masks
    finally:
        F.dropout = plain


def _dropping_model(name: str, world: World, *, sequence_parallel: bool, checkpointing: bool) -> Any:
    model_type, fields = DROPPING[name]
    torch.manual_seed(4)
    config = tiny(model_type, num_hidden_layers=3, **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    mapper = cut(model, world, sequence_parallel=sequence_parallel)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, VocabularyCrossEntropy(shard=mapper.vocabulary_shard())


def _blocks(model: nn.Module) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def dropping_steps(
    name: str, world: World, *, micro_batches: int = 1, sequence_parallel: bool = False, checkpointing: bool = False
) -> Step:
    """All micro-batches forward, then all of them backward, as a pipeline may do."""
    model, cross_entropy = _dropping_model(
        name, world, sequence_parallel=sequence_parallel, checkpointing=checkpointing
    )
    hidden: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda m, a, y: hidden.append((y[0] if isinstance(y, tuple) else y).detach()))
        for block in _blocks(model)
    ]
    torch.manual_seed(9)
    ids = torch.randint(5, 256, (micro_batches, 2, 24), generator=torch.Generator().manual_seed(1))
    with recorded_dropout() as masks:
        losses = [cross_entropy(model(i, use_cache=False).logits, i).objective for i in ids]
        masks = copy.deepcopy(masks)
    for handle in handles:
        handle.remove()
    for loss in losses:
        loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return Step(torch.stack(losses).detach(), gradients, hidden, masks, torch.get_rng_state())


def _same(values: list[Tensor]) -> bool:
    return all(torch.equal(values[0], other) for other in values[1:])


def _all_differ(values: list[Tensor]) -> bool:
    return not any(torch.equal(a, b) for a, b in itertools.combinations(values, 2))


def dropout_is_drawn_right(names: list[str]) -> list[str]:
    """What does not hold, by family."""
    wrong = []
    with single_tensor_group() as world:
        for name in names:
            step = dropping_steps(name, world)
            ranks = gather_from_ranks(step)
            attention = [rank.masks["apart"] for rank in ranks]
            holds = {
                "there is dropout in attention": all(len(masks) == 3 for masks in attention),
                "hidden states are the same": all(_same(list(s)) for s in zip(*(r.hidden for r in ranks), strict=True)),
                "losses are the same": _same([rank.loss for rank in ranks]),
                "hidden states drop the same": all(
                    _same(list(masks)) for masks in zip(*(r.masks["together"] for r in ranks), strict=True)
                ),
                "heads drop apart": _all_differ([mask for masks in attention for mask in masks]),
                "as much as asked for": all(0.75 < m.float().mean() < 0.85 for masks in attention for m in masks),
                "the generators end alike": _same([rank.state for rank in ranks]),
                "two micro-batches drop apart": _all_differ(
                    dropping_steps(name, world, micro_batches=2).masks["apart"]
                ),
            }
            for sequence_parallel, micro_batches in itertools.product((False, True), (1, 2)):
                with contextlib.suppress(PlanError):
                    options = {"sequence_parallel": sequence_parallel, "micro_batches": micro_batches}
                    plain = dropping_steps(name, world, **options)
                    again = dropping_steps(name, world, checkpointing=True, **options)
                    what = f"recomputed, {options}"
                    holds |= {
                        f"{what}: loss": torch.equal(plain.loss, again.loss),
                        f"{what}: gradients": all(
                            torch.equal(g, again.gradients[n]) for n, g in plain.gradients.items()
                        ),
                        f"{what}: generator": torch.equal(plain.state, again.state),
                        f"{what}: generators": _same(gather_from_ranks(again.state)),
                    }
            wrong += [f"{name}: not so: {claim}" for claim, true in holds.items() if not true]
    return wrong


def test_dropout() -> None:
    assert run_ranks(dropout_is_drawn_right, 2, list(DROPPING)) == [[], []]


def one_stream_for_all(names: list[str]) -> list[str]:
    Region.use_rank_local_rng = lambda self, device: None  # type: ignore[method-assign]
    return dropout_is_drawn_right(names)


def numbers_that_do_not_come_again(names: list[str]) -> list[str]:
    def use_rank_local_rng(self: Region, device: torch.device) -> None:
        if self._shared_state is None:
            self._shared_state = torch.get_rng_state()
            torch.seed()

    def use_shared_rng(self: Region, device: torch.device) -> None:
        if self._shared_state is not None:
            torch.set_rng_state(self._shared_state)
            self._shared_state = None

    Region.use_rank_local_rng, Region.use_shared_rng = use_rank_local_rng, use_shared_rng  # type: ignore[method-assign]
    return dropout_is_drawn_right(names)


@pytest.mark.parametrize(("sabotage", "claim"), [(one_stream_for_all, "heads drop apart"),
                                                 (numbers_that_do_not_come_again, "gradients")])  # fmt: skip
def test_wrong_random_numbers_are_detected(sabotage: Callable[[list[str]], list[str]], claim: str) -> None:
    assert any(said.endswith(claim) for said in run_ranks(sabotage, 2, ["gpt2"])[0])


def compare_sequence_dropout(name: str) -> list[str]:
    with single_tensor_group() as world:
        ranks = gather_from_ranks(dropping_steps(name, world, sequence_parallel=True))
        embedded, *inside = zip(*(rank.masks["together"] for rank in ranks), strict=True)
        holds = {
            "embeddings drop the same": _same(list(embedded)) and embedded[0].shape[1] == 24,
            "stretches drop apart": _all_differ([mask for masks in inside for mask in masks]),
            "stretches are parts": all(mask.shape[1] == 12 for masks in inside for mask in masks),
            "heads drop apart": _all_differ([mask for rank in ranks for mask in rank.masks["apart"]]),
            "the output is the same": _same([rank.hidden[-1] for rank in ranks]),
            "the losses are the same": _same([rank.loss for rank in ranks]),
            "the generators end alike": _same([rank.state for rank in ranks]),
        }
        return [claim for claim, true in holds.items() if not true]


def test_dropout_with_sequence_parallel() -> None:
    assert run_ranks(compare_sequence_dropout, 2, "gpt2") == [[], []]
