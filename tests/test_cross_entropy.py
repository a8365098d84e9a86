"""Cross entropy over a sharded vocabulary."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.harness import run_ranks
from tests.tensor_parallel_helpers import single_tensor_group
from tools.bench.traffic import Recorder
from trainer.errors import TesseraError
from trainer.sharding import VocabularyShard
from trainer.tasks import IGNORE_INDEX
from trainer.tasks.cross_entropy import VocabularyCrossEntropy

TOKENS = 20
TYPES = (torch.float32, torch.float64, torch.bfloat16)


def _reference(logits: Tensor, labels: Tensor, smoothing: float, z_loss: float) -> tuple[Tensor, Tensor]:
    """Return (cross entropy, objective), summed, from torch's own functions."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    plain = F.cross_entropy(wide, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    smooth = F.cross_entropy(wide, labels, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=smoothing)
    return plain, smooth + z_loss * wide.logsumexp(-1)[labels != IGNORE_INDEX].square().sum()


def _local_columns(whole: Tensor, ranks: int, rank: int, padding: float) -> Tensor:
    """Return a rank's columns, with `padding` as the value of the padded ones."""
    width = -(-whole.shape[1] // ranks)
    padded = F.pad(whole, (0, width * ranks - whole.shape[1]), value=padding)
    return padded[:, rank * width : (rank + 1) * width].clone()


def check_loss(ranks: int, rank: int, group: Any, vocabulary: int, types: Sequence[torch.dtype]) -> int:
    """Compare values and gradients of every variant with torch's; return the number of variants."""
    width = -(-vocabulary // ranks)
    count = 0
    for dtype, smoothing, z_loss, chunk, padding in itertools.product(
        types, (0.0, 0.1), (0.0, 1e-2), (1, 3, None), (7.0, -torch.inf)
    ):
        generator = torch.Generator().manual_seed(vocabulary)
        whole = (3 * torch.randn(TOKENS, vocabulary, generator=generator)).to(dtype)
        labels = torch.randint(0, vocabulary, (TOKENS,), generator=generator)
        labels[:2], labels[::6] = vocabulary - 1, IGNORE_INDEX
        logits = whole.clone().requires_grad_()
        expected = _reference(logits, labels, smoothing, z_loss)
        (3 * expected[1]).backward()
        own = _local_columns(whole, ranks, rank, padding)
        before = own.clone()
        own.requires_grad_()
        loss = VocabularyCrossEntropy(smoothing, z_loss, chunk, VocabularyShard(vocabulary, width, group, rank, ranks))
        sums = loss(own.view(2, -1, width), labels.view(2, -1))
        (3 * sums.objective).backward()
        expected_gradient = _local_columns(logits.grad, ranks, rank, 0.0)  # type: ignore[arg-type]
        exact = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-6}[dtype]
        torch.testing.assert_close(sums.loss_sum, expected[0].detach(), rtol=exact, atol=exact)
        torch.testing.assert_close(sums.objective, expected[1].detach(), rtol=exact, atol=exact)
        plain = F.cross_entropy(whole.to(sums.target_losses.dtype), labels, ignore_index=IGNORE_INDEX, reduction="none")
        torch.testing.assert_close(sums.target_losses, plain.view(2, -1), rtol=exact, atol=exact)
        exact = 8e-3 if dtype == torch.bfloat16 else 5 * exact
        torch.testing.assert_close(own.grad, expected_gradient, rtol=exact, atol=exact)
        assert sums.loss_sum.dtype == torch.promote_types(dtype, torch.float32)
        assert not sums.loss_sum.requires_grad
        assert torch.equal(own.detach(), before), "the logits were changed"
        count += 1
    return count


class Widest(TorchDispatchMode):
    """Records the largest number of tokens whose logits are in fp32 in one tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tokens, self._width = 0, width

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.dtype == torch.float32 and made.shape[-1:] == (self._width,):
            self.tokens = max(self.tokens, made.numel() // self._width)
        return made


def compare_loss(vocabularies: list[int], types: Sequence[torch.dtype]) -> int:
    """Run `check_loss`, and check the collectives, the tokens of a chunk, and batches without a target."""
    with single_tensor_group() as world:
        ranks, rank, group = world.topology.world_size, world.topology.rank, world.groups.of("tensor")
        count = sum(check_loss(ranks, rank, group, vocabulary, types) for vocabulary in vocabularies)
        width = 7
        for smoothing, chunk in itertools.product((0.0, 0.1), (None, 3)):
            shard = VocabularyShard(ranks * width - 2, width, group, rank, ranks)
            loss = VocabularyCrossEntropy(smoothing, 1e-3, chunk, shard)
            logits = torch.randn(TOKENS, width, dtype=torch.bfloat16, requires_grad=True)
            labels = torch.arange(TOKENS) % (ranks * width - 2)
            recorder, widest = Recorder(), Widest(width)
            with recorder, widest:
                objective = loss(logits, labels).objective
                objective.backward()
            assert sum(recorder.counts.values()) == 3
            assert {word for _, word, _ in recorder.counts} == {"all-reduce"}
            assert max(size for _, _, size in recorder.counts) <= (2 if smoothing else 1) * TOKENS * 4
            assert widest.tokens == (chunk or TOKENS)
            logits.grad = None
            nothing = loss(logits, torch.full((TOKENS,), IGNORE_INDEX))
            nothing.objective.backward()
            assert (float(nothing.loss_sum), float(nothing.objective.detach())) == (0.0, 0.0)
            assert logits.grad is not None
            assert not logits.grad.any()
            empty = loss(logits[:0], labels[:0])
            empty.objective.backward()
            assert float(empty.objective.detach()) == 0.0
    return count


def test_loss_of_two_ranks_matches_reference() -> None:
    assert run_ranks(compare_loss, 2, [13, 12], TYPES) == [2 * 72] * 2


def test_loss_of_padding_only_ranks_matches_reference() -> None:
    assert run_ranks(compare_loss, 8, [10], [torch.float32]) == [24] * 8


@pytest.mark.fast
def test_loss_of_full_logits_matches_reference() -> None:
    assert check_loss(1, 0, None, 13, TYPES) == 72


def compare_loss_that_counts_padding() -> int:
    chunks = VocabularyCrossEntropy.chunks

    def chunks_with_padding(loss: VocabularyCrossEntropy, logits_NV: Tensor) -> Iterator[tuple[slice, Tensor]]:
        return chunks(replace(loss, shard=replace(loss.shard, size=None)), logits_NV)

    VocabularyCrossEntropy.chunks = chunks_with_padding  # type: ignore[method-assign]
    return compare_loss([13], [torch.float32])


def test_counted_padding_is_detected() -> None:
    with pytest.raises(AssertionError, match="not close"):
        run_ranks(compare_loss_that_counts_padding, 2)


@pytest.mark.fast
def test_logits_of_unexpected_width_are_refused() -> None:
    loss = VocabularyCrossEntropy(shard=VocabularyShard(size=13, width=7, ranks=2))
    with pytest.raises(TesseraError, match="13 columns where this rank's shard of the head has 7"):
        loss(torch.zeros(2, 13), torch.zeros(2, dtype=torch.long))
