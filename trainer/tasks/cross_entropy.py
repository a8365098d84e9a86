"""Cross entropy over a vocabulary that is sharded along the tensor ranks.

Shapes: N tokens, C tokens of a chunk, v columns of the vocabulary on this rank, padding included.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3; label smoothing after Szegedy et al. 2016, "Rethinking the
Inception Architecture", section 7; z-loss after Chowdhery et al. 2022, "PaLM", section 5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from trainer.errors import TesseraError
from trainer.sharding import VocabularyShard
from trainer.tasks.micro_batch import IGNORE_INDEX


class LossSums(NamedTuple):
    """Sums over the targets of a micro-batch, which add up over micro-batches and ranks."""

    loss_sum: Tensor
    """The reported loss, for instance -log p(label). Scalar, at least fp32, without a gradient."""

    objective: Tensor
    """The minimized loss, for instance with label smoothing and z-loss. Scalar, at least fp32."""

    target_losses: Tensor
    """The reported loss of each label, in the labels' shape; 0 where ignored. At least fp32, without a gradient."""

    extra: Mapping[str, Tensor] = MappingProxyType({})
    """Further sums, by the names in `Task.extra_sums`. Scalars without a gradient."""


@dataclass(frozen=True)
class VocabularyCrossEntropy:
    """Cross entropy of logits of which this rank has the columns of `shard`.

    With p = softmax(logits) and log Z = logsumexp(logits), summed over the tokens whose label is not ignored:

        (1 - s) * -log p(label) + s * mean over the vocabulary of -log p + z * (log Z)^2

    Three all-reduces of one number a token (the largest logit, the sum of exponentials, the label's logit; with
    smoothing a second number travels with the last). Columns from the vocabulary's size on are padding and count as
    -infinity.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk_tokens: int | None = None
    """Number of tokens whose logits are in fp32 at once; None for all."""

    shard: VocabularyShard = field(default_factory=VocabularyShard)

    def __call__(self, logits: Tensor, labels: Tensor) -> LossSums:
        """Return the sums over a micro-batch. Collective: all ranks of the shard's group must call it.

        Args:
            logits: (..., v), of any float type.
            labels: (...), ids of the full vocabulary, or `IGNORE_INDEX`.

        Raises:
            TesseraError: if the logits have another width than this rank's shard of the head.
        """
        if self.shard.width is not None and logits.shape[-1] != self.shard.width:
            raise TesseraError(
                f"the logits have {logits.shape[-1]} columns where this rank's shard of the head has "
                f"{self.shard.width}: the model does not compute them with the module that it calls its output "
                "embeddings"
            )
        per_target, objective = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
            logits.flatten(0, -2), labels.flatten(), self
        )
        return LossSums(per_target.sum(), objective, per_target.view(labels.shape))

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce a tensor of any shape in place. Collective: all ranks of the shard's group must call it."""
        if self.shard.ranks > 1:
            dist.all_reduce(tensor, op=op, group=self.shard.group)
        return tensor

    def chunks(self, logits_Nv: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield ranges of C tokens with their logits (C, v), at least fp32, padding at -infinity.

        The logits that are yielded may be those of the model, and must not be changed.
        """
        count, width = logits_Nv.shape
        step = min(count, self.chunk_tokens or count)
        size, rank = self.shard.size, self.shard.rank
        columns = width if size is None else max(0, size - rank * width)  # without padding
        for start in range(0, count, max(1, step)):
            chunk = slice(start, min(start + step, count))
            logits_Cv = logits_Nv[chunk].to(torch.promote_types(logits_Nv.dtype, torch.float32))
            if columns < width:
                logits_Cv = logits_Cv.clone() if logits_Cv.dtype == logits_Nv.dtype else logits_Cv
                logits_Cv[:, columns:] = -torch.inf
            yield chunk, logits_Cv

    def local_columns(self, labels_N: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Return (column of each label on this rank, or 0; whether it is on this rank), both (N)."""
        columns_N = labels_N - self.shard.rank * width
        is_local_N = (columns_N >= 0) & (columns_N < width) & (labels_N != IGNORE_INDEX)
        return columns_N.masked_fill(~is_local_N, 0), is_local_N


class _Context(FunctionCtx):
    """Context from the forward pass to the backward pass."""

    loss: VocabularyCrossEntropy
    saved_tensors: tuple[Tensor, ...]


class _CrossEntropy(torch.autograd.Function):
    """(logits (N, v), labels (N), loss) to (reported loss of each token (N), objective ()).

    Autograd's own backward pass would keep the softmax in fp32 for all tokens at once. This one saves log Z of each
    token, one number, and computes the softmax again, chunk by chunk.
    """

    @staticmethod
    def forward(
        ctx: _Context, logits_Nv: Tensor, labels_N: Tensor, loss: VocabularyCrossEntropy
    ) -> tuple[Tensor, Tensor]:
        """Compute both losses. Collective: all ranks of the loss's group must call it."""
        dtype = torch.promote_types(logits_Nv.dtype, torch.float32)
        count, width = logits_Nv.shape
        columns_N, is_local_N = loss.local_columns(labels_N, width)
        is_target_N = labels_N != IGNORE_INDEX
        largest_N = logits_Nv.new_empty(count, dtype=dtype)
        exponentials_N = torch.empty_like(largest_N)
        # Two numbers a token that are sums over columns: the label's logit, and, for smoothing, all logits.
        sums_2N = logits_Nv.new_zeros((2, count), dtype=dtype)

        # 1. The largest logit of each token over the full vocabulary. It is subtracted in 2, so that no exponential
        #    overflows; all ranks must subtract the same, or their sums could not be added.
        for chunk, logits_Cv in loss.chunks(logits_Nv):
            largest_N[chunk] = logits_Cv.amax(-1)
        loss.all_reduce(largest_N, dist.ReduceOp.MAX)

        # 2. Sums over this rank's columns: of the exponentials, of the label's logit (0 if another rank has the
        #    label), and of all logits. Padding adds exp(-infinity) = 0 to the first, and is left out of the last.
        for chunk, logits_Cv in loss.chunks(logits_Nv):
            label_logits_C = logits_Cv.gather(1, columns_N[chunk, None]).squeeze(1)
            sums_2N[0, chunk] = torch.where(is_local_N[chunk], label_logits_C, 0)
            if loss.label_smoothing:
                sums_2N[1, chunk] = logits_Cv.masked_fill(logits_Cv == -torch.inf, 0).sum(-1)
            exponentials_N[chunk] = (logits_Cv - largest_N[chunk, None]).exp_().sum(-1)
        loss.all_reduce(exponentials_N)
        loss.all_reduce(sums_2N if loss.label_smoothing else sums_2N[0])

        # 3. log Z = largest + log(sum of exp(logit - largest)), and from it -log p(label) = log Z - logit(label) and
        #    mean over the vocabulary of -log p = log Z - mean of the logits.
        log_z_N = largest_N + exponentials_N.log()
        cross_entropy_N = torch.where(is_target_N, log_z_N - sums_2N[0], 0)
        smoothed_N = torch.where(is_target_N, log_z_N - sums_2N[1] / (loss.shard.size or width), 0)
        z_N = torch.where(is_target_N, log_z_N.square(), 0)
        objective = (
            (1 - loss.label_smoothing) * cross_entropy_N.sum()
            + loss.label_smoothing * smoothed_N.sum()
            + loss.z_loss * z_N.sum()
        )
        ctx.loss = loss
        ctx.save_for_backward(logits_Nv, log_z_N, columns_N, is_local_N, is_target_N)
        ctx.mark_non_differentiable(cross_entropy_N)
        return cross_entropy_N, objective

    @staticmethod
    def backward(ctx: _Context, _: Tensor, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradient of this rank's logits; it needs no communication.

        With d log Z / d logit(i) = p(i), V the vocabulary's size, and the terms of the objective in its order:

            (1 - s) * (p(i) - [i = label]) + s * (p(i) - 1 / V) + z * 2 * log Z * p(i)
            = p(i) * (1 + 2 * z * log Z) - (1 - s) * [i = label] - s / V
        """
        logits_Nv, log_z_N, columns_N, is_local_N, is_target_N = ctx.saved_tensors
        loss = ctx.loss
        result_Nv = torch.empty_like(logits_Nv)
        for chunk, logits_Cv in loss.chunks(logits_Nv):
            log_z_C1 = log_z_N[chunk, None]
            gradient_Cv = (logits_Cv - log_z_C1).exp_()  # p, which is 0 in padding
            if loss.z_loss:
                gradient_Cv *= 1 + 2 * loss.z_loss * log_z_C1
            label_weight_C1 = -(1 - loss.label_smoothing) * is_local_N[chunk, None].to(gradient_Cv)
            gradient_Cv.scatter_add_(1, columns_N[chunk, None], label_weight_C1)
            if loss.label_smoothing:
                share = loss.label_smoothing / (loss.shard.size or logits_Nv.shape[1])
                gradient_Cv -= share * (logits_Cv > -torch.inf).to(gradient_Cv)  # padding contributes nothing
            gradient_Cv *= torch.where(is_target_N[chunk, None], gradient, 0)
            result_Nv[chunk] = gradient_Cv.to(result_Nv.dtype)
        return result_Nv, None, None
