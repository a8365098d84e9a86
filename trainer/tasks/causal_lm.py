"""Causal language modeling: predict each next token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from trainer.config.schema import DataSection
from trainer.tasks.cross_entropy import LossSums, VocabularyCrossEntropy
from trainer.tasks.example_inputs import example_ids
from trainer.tasks.interface import Collation, Ids, Needs, Prediction, Samples, TokenDocuments
from trainer.tasks.micro_batch import IGNORE_INDEX, MicroBatch
from trainer.tasks.samples import build_samples


def perplexity(loss: float) -> float:
    """Return exp(loss), or infinity where that is more than a float holds."""
    return math.exp(loss) if loss < 700 else math.inf


class CausalLM:
    """Implements `Task`. Labels are the inputs shifted by one, so position t of the logits belongs to label t."""

    name = "causal_lm"
    auto_class: type[Any] = AutoModelForCausalLM
    needs = Needs.HIDDEN_AND_HEAD
    forward_options: Mapping[str, object] = {"use_cache": False}
    extra_sums: tuple[str, ...] = ()

    def open_samples(self, tokens: TokenDocuments, data: DataSection) -> Samples:
        """See `Task.open_samples`."""
        return build_samples(tokens, data.packing, data.sequence_length, drop_last=data.drop_last)

    def collate(self, rows: Sequence[Ids], collation: Collation) -> MicroBatch:
        """Collate rows of 2 to `length + 1` ids, padded on the right to a common width."""
        longest = max(len(row) for row in rows) - 1
        multiple = collation.pad_to_multiple_of
        width = min(collation.length, -(-longest // multiple) * multiple)
        inputs_BT = np.full((len(rows), width), collation.pad_id, np.int64)
        labels_BT = np.full((len(rows), width), IGNORE_INDEX, np.int64)
        mask_BT = np.zeros((len(rows), width), np.int64)
        for number, row in enumerate(rows):
            count = len(row) - 1
            inputs_BT[number, :count] = row[:-1]
            labels_BT[number, :count] = row[1:]
            mask_BT[number, :count] = 1
        inputs = {"input_ids": torch.from_numpy(inputs_BT)}
        if collation.mask_padding and not mask_BT.all():
            inputs["attention_mask"] = torch.from_numpy(mask_BT)
        return MicroBatch(inputs, torch.from_numpy(labels_BT), int(mask_BT.sum()))

    def example_inputs(self, model: PreTrainedModel, batch: int, length: int) -> dict[str, Tensor]:
        """See `Task.example_inputs`."""
        return example_ids(model, batch, length)

    def loss(self, prediction: Prediction, labels: Tensor, cross_entropy: VocabularyCrossEntropy) -> LossSums:
        """See `Task.loss`; `labels` are (B, T)."""
        return cross_entropy(prediction.head(prediction.hidden), labels)

    def metrics(self, loss: float, extra: Mapping[str, float]) -> dict[str, float]:
        """See `Task.metrics`."""
        return {"perplexity": perplexity(loss)}
