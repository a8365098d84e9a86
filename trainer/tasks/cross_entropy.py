"""Cross entropy over a vocabulary that is cut along the tensor ranks.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3; label smoothing after Szegedy et al. 2016, "Rethinking the
Inception Architecture", section 7; z-loss after Chowdhery et al. 2022, "PaLM", section 5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed.collectives import Group
from trainer.errors import TesseraError
from trainer.tasks.micro_batch import IGNORE_INDEX


class LossSums(NamedTuple):
    """Sums over the targets of a micro-batch."""

    loss: Tensor
    """Reported loss, for instance -log p(label). Scalar without a gradient."""

    objective: Tensor
    """Minimized loss, for instance with label smoothing and z-loss. Scalar."""

    per_target: Tensor
    """Reported loss of each label, 0 where it is ignored. The labels' shape, without a gradient."""

    extra: Mapping[str, Tensor] = MappingProxyType({})
    """Further sums, by the names in `Task.extra_sums`. Scalars without a gradient."""


@dataclass(frozen=True)
class VocabularyCrossEntropy:
    """Cross entropy of logits of which this rank has the columns [first, first + width) of `vocabulary`.

    With p = softmax(logits) and log Z = logsumexp(logits), summed over the tokens whose label is not ignored:

        (1 - s) * -log p(label) + s * mean over the vocabulary of -log p + z * (log Z)^2

    Three all-reduces of one number a token (the largest logit, the sum of exponentials, the label's logit; with
    smoothing a second number travels with the last). Columns from `vocabulary` on are padding and count as -infinity.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk_tokens: int | None = None
    """So many tokens' logits are in fp32 at once; None for all."""

    vocabulary: int | None = None
    """None where this rank has all columns."""

    width: int | None = None
    """How many of them this rank has, padding included."""

    group: Group = None
    rank: int = 0
    ranks: int = 1

    def __call__(self, logits: Tensor, labels: Tensor) -> LossSums:
        """`logits` (..., width) in any float type; `labels` (...) ids of the whole vocabulary, or -100."""
        if self.width is not None and logits.shape[-1] != self.width:
            raise TesseraError(
                f"the logits have {logits.shape[-1]} columns where this rank's part of the head has {self.width}: the "
                "model does not compute them with the module that it calls its output embeddings"
            )
        per_target, objective = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
            logits.flatten(0, -2), labels.flatten(), self
        )
        return LossSums(per_target.sum(), objective, per_target.view(labels.shape))

    def _reduced(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        if self.ranks > 1:
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor

    def _chunks(self, logits_NV: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Ranges of tokens with their logits, at least fp32, padding at -infinity. The logits must not be changed."""
        count = len(logits_NV)
        step = min(count, self.chunk_tokens or count)
        width = logits_NV.shape[1]
        real = width if self.vocabulary is None else max(0, self.vocabulary - self.rank * width)
        for start in range(0, count, max(1, step)):
            chunk = slice(start, min(start + step, count))
            wide = logits_NV[chunk].to(torch.promote_types(logits_NV.dtype, torch.float32))
            if real < width:
                wide = wide.clone() if wide.dtype == logits_NV.dtype else wide
                wide[:, real:] = -torch.inf
            yield chunk, wide

    def _local_labels(self, labels_N: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """(column of each label here, or 0; whether it is here)."""
        columns = labels_N - self.rank * width
        here = (columns >= 0) & (columns < width) & (labels_N != IGNORE_INDEX)
        return columns.masked_fill(~here, 0), here


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, loss: VocabularyCrossEntropy) -> Any:
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        count, width = logits_NV.shape
        columns_N, here_N = loss._local_labels(labels_N, width)
        largest_N = logits_NV.new_empty(count, dtype=wide)
        exponentials_N, of_label = torch.empty_like(largest_N), logits_NV.new_zeros((2, count), dtype=wide)
        for chunk, logits in loss._chunks(logits_NV):
            largest_N[chunk] = logits.amax(-1)
        loss._reduced(largest_N, dist.ReduceOp.MAX)
        for chunk, logits in loss._chunks(logits_NV):
            label = logits.gather(1, columns_N[chunk, None]).squeeze(1)
            of_label[0, chunk] = torch.where(here_N[chunk], label, 0)
            if loss.label_smoothing:
                of_label[1, chunk] = logits.masked_fill(logits == -torch.inf, 0).sum(-1)
            exponentials_N[chunk] = (logits - largest_N[chunk, None]).exp_().sum(-1)
        loss._reduced(exponentials_N)
        loss._reduced(of_label if loss.label_smoothing else of_label[0])
        log_z_N = largest_N + exponentials_N.log()
        predicted_N = labels_N != IGNORE_INDEX
        vocabulary = loss.vocabulary or width
        cross_entropy_N = torch.where(predicted_N, log_z_N - of_label[0], 0)
        smoothed_N = torch.where(predicted_N, log_z_N - of_label[1] / vocabulary, 0)
        z_N = torch.where(predicted_N, log_z_N.square(), 0)
        objective = (
            (1 - loss.label_smoothing) * cross_entropy_N.sum()
            + loss.label_smoothing * smoothed_N.sum()
            + loss.z_loss * z_N.sum()
        )
        ctx.loss = loss
        ctx.save_for_backward(logits_NV, log_z_N, columns_N, here_N, predicted_N)
        ctx.mark_non_differentiable(cross_entropy_N)
        return cross_entropy_N, objective

    @staticmethod
    def backward(ctx: Any, _: Tensor, gradient: Tensor) -> Any:
        logits_NV, log_z_N, columns_N, here_N, predicted_N = ctx.saved_tensors
        loss: VocabularyCrossEntropy = ctx.loss
        result_NV = torch.empty_like(logits_NV)
        for chunk, logits in loss._chunks(logits_NV):
            log_z = log_z_N[chunk, None]
            slope = (logits - log_z).exp_()
            if loss.z_loss:
                slope *= 1 + 2 * loss.z_loss * log_z
            slope.scatter_add_(1, columns_N[chunk, None], -(1 - loss.label_smoothing) * here_N[chunk, None].to(slope))
            if loss.label_smoothing:
                share = loss.label_smoothing / (loss.vocabulary or logits_NV.shape[1])
                slope -= share * (logits > -torch.inf).to(slope)
            slope *= torch.where(predicted_N[chunk, None], gradient, 0)
            result_NV[chunk] = slope.to(result_NV.dtype)
        return result_NV, None, None
