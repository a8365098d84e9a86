"""Dropout: shared random numbers outside tensor-parallel regions, rank-local inside, the same when recomputed."""

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
from tests.tensor_parallel_helpers import gather_from_ranks, shard_model, single_tensor_group
from tools.parity.shrink import tiny
from trainer.distributed import World
from trainer.errors import PlanError
from trainer.tasks.cross_entropy import VocabularyCrossEntropy
from trainer.tensor_parallel.region import Region

DROPOUT_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"attn_pdrop": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.2}),
    "llama": ("llama", {"attention_dropout": 0.2}),
    "gptj": ("gptj", {"attn_pdrop": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.2}),
}


@dataclass
class Step:
    """Results of a forward and a backward pass."""

    loss: Tensor
    gradients: dict[str, Tensor]
    hidden: list[Tensor]
    """Output of each block, (B, T, D)."""

    masks: dict[str, list[Tensor]]
    """Elements that dropout kept, in attention (`local`) and in hidden states (`shared`), in forward order."""

    state: Tensor
    """Final state of the generator."""


@contextlib.contextmanager
def recorded_dropout() -> Iterator[dict[str, list[Tensor]]]:
    """Record the masks of every dropout that is applied."""
    masks: dict[str, list[Tensor]] = {"local": [], "shared": []}
    plain = F.dropout

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return plain(x, p, training, inplace)
        kept_mask = plain(torch.ones_like(x), p)
        masks["local" if x.ndim == 4 else "shared"].append(kept_mask != 0)
        return x * kept_mask

    F.dropout = dropout
    try:
        yield masks
    finally:
        F.dropout = plain


def _model_with_dropout(name: str, world: World, *, sequence_parallel: bool, checkpointing: bool) -> Any:
    model_type, fields = DROPOUT_MODELS[name]
    torch.manual_seed(4)
    config = tiny(model_type, num_hidden_layers=3, **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    mapper = shard_model(model, world, sequence_parallel=sequence_parallel)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, VocabularyCrossEntropy(shard=mapper.vocabulary_shard())


def _blocks(model: nn.Module) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def run_step_with_dropout(
    name: str, world: World, *, micro_batches: int = 1, sequence_parallel: bool = False, checkpointing: bool = False
) -> Step:
    """Run all micro-batches forward, then all of them backward, as a pipeline may do."""
    model, cross_entropy = _model_with_dropout(
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


def check_dropout(names: list[str]) -> list[str]:
    """Return the claims that do not hold, by family. Collective: all ranks must call it."""
    wrong = []
    with single_tensor_group() as world:
        for name in names:
            step = run_step_with_dropout(name, world)
            ranks = gather_from_ranks(step)
            attention = [rank.masks["local"] for rank in ranks]
            holds = {
                "there is dropout in attention": all(len(masks) == 3 for masks in attention),
                "hidden states are the same": all(_same(list(s)) for s in zip(*(r.hidden for r in ranks), strict=True)),
                "losses are the same": _same([rank.loss for rank in ranks]),
                "hidden states have the same masks": all(
                    _same(list(masks)) for masks in zip(*(r.masks["shared"] for r in ranks), strict=True)
                ),
                "heads have independent masks": _all_differ([mask for masks in attention for mask in masks]),
                "the rate is the configured one": all(
                    0.75 < m.float().mean() < 0.85 for masks in attention for m in masks
                ),
                "the generators have the same state": _same([rank.state for rank in ranks]),
                "two micro-batches have independent masks": _all_differ(
                    run_step_with_dropout(name, world, micro_batches=2).masks["local"]
                ),
            }
            for sequence_parallel, micro_batches in itertools.product((False, True), (1, 2)):
                with contextlib.suppress(PlanError):
                    options = {"sequence_parallel": sequence_parallel, "micro_batches": micro_batches}
                    plain = run_step_with_dropout(name, world, **options)
                    again = run_step_with_dropout(name, world, checkpointing=True, **options)
                    what = f"recomputed, {options}"
                    holds |= {
                        f"{what}: loss": torch.equal(plain.loss, again.loss),
                        f"{what}: gradients": all(
                            torch.equal(g, again.gradients[n]) for n, g in plain.gradients.items()
                        ),
                        f"{what}: generator": torch.equal(plain.state, again.state),
                        f"{what}: generators": _same(gather_from_ranks(again.state)),
                    }
            wrong += [f"{name}: {claim}" for claim, true in holds.items() if not true]
    return wrong


def test_dropout_masks_of_ranks() -> None:
    assert run_ranks(check_dropout, 2, list(DROPOUT_MODELS)) == [[], []]


def share_one_stream(names: list[str]) -> list[str]:
    Region.use_rank_local_rng = lambda self, device: None  # type: ignore[method-assign]
    return check_dropout(names)


def use_unrepeatable_numbers(names: list[str]) -> list[str]:
    def use_rank_local_rng(self: Region, device: torch.device) -> None:
        if self._shared_state is None:
            self._shared_state = torch.get_rng_state()
            torch.seed()

    def use_shared_rng(self: Region, device: torch.device) -> None:
        if self._shared_state is not None:
            torch.set_rng_state(self._shared_state)
            self._shared_state = None

    Region.use_rank_local_rng, Region.use_shared_rng = use_rank_local_rng, use_shared_rng  # type: ignore[method-assign]
    return check_dropout(names)


@pytest.mark.parametrize(
    ("sabotage", "claim"),
    [(share_one_stream, "heads have independent masks"), (use_unrepeatable_numbers, "gradients")],
)
def test_wrong_random_numbers_are_detected(sabotage: Callable[[list[str]], list[str]], claim: str) -> None:
    assert any(failed.endswith(claim) for failed in run_ranks(sabotage, 2, ["gpt2"])[0])


def compare_sequence_dropout(name: str) -> list[str]:
    with single_tensor_group() as world:
        ranks = gather_from_ranks(run_step_with_dropout(name, world, sequence_parallel=True))
        embedded, *inside = zip(*(rank.masks["shared"] for rank in ranks), strict=True)
        holds = {
            "embeddings have the same mask": _same(list(embedded)) and embedded[0].shape[1] == 24,
            "parts of the sequence have independent masks": _all_differ([mask for masks in inside for mask in masks]),
            "masks cover a part of the sequence": all(mask.shape[1] == 12 for masks in inside for mask in masks),
            "heads have independent masks": _all_differ([mask for rank in ranks for mask in rank.masks["local"]]),
            "the output is the same": _same([rank.hidden[-1] for rank in ranks]),
            "the losses are the same": _same([rank.loss for rank in ranks]),
            "the generators have the same state": _same([rank.state for rank in ranks]),
        }
        return [claim for claim, true in holds.items() if not true]


def test_dropout_with_sequence_parallel() -> None:
    assert run_ranks(compare_sequence_dropout, 2, "gpt2") == [[], []]
