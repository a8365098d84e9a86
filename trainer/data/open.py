"""Open prepared data as the batches of one rank."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from trainer.data.batches import BatchShape, EvaluationBatches, TrainBatches
from trainer.data.epochs import build_sample_order
from trainer.data.samples import CheckedSamples
from trainer.tasks import TASKS, Collation

if TYPE_CHECKING:
    from trainer.config import LoadedConfig
    from trainer.data.indexed import IndexedTokens
    from trainer.data.prepare import PreparedData
    from trainer.topology import Topology

log = logging.getLogger(__name__)

PAD_MULTIPLE = 8
"""The width of a padded micro-batch is a multiple of this, which keeps kernels fast and distinct shapes few."""


@dataclass(frozen=True)
class Batches:
    """Training and validation batches of one rank."""

    train: TrainBatches
    validation: EvaluationBatches | None
    fingerprint: Mapping[str, list[str] | list[float]]
    """Identifies the training data and its mixture: with equal fingerprints and seeds, step n reads equal samples."""

    @property
    def evaluated_samples(self) -> tuple[int, ...]:
        """Number of validation samples of each source that an evaluation reads; empty without validation data."""
        return () if self.validation is None else self.validation.shares


def open_batches(loaded: LoadedConfig, prepared: PreparedData, topology: Topology, *, pin: bool = False) -> Batches:
    """Open this rank's share of the data.

    Args:
        loaded: the configuration.
        prepared: token files of all sources.
        topology: determines which micro-batches belong to this rank.
        pin: copy micro-batches to pinned memory.

    Raises:
        DataError: a source is too small for one sample.
    """
    data, task = loaded.config.data, TASKS[loaded.config.model.task]

    def open_samples(tokens: IndexedTokens) -> CheckedSamples:
        samples = task.open_samples(tokens, data)
        if samples.num_truncated:
            log.warning(
                "%s: truncating %d of %d documents to data.sequence_length + 1 = %d tokens",
                tokens.bin_path,
                samples.num_truncated,
                len(tokens),
                data.sequence_length + 1,
            )
        return CheckedSamples(samples, tokens, loaded.facts.vocabulary_size)

    train = [open_samples(tokens) for tokens in prepared.train]
    validation = [open_samples(tokens) for tokens in prepared.validation]
    shape = BatchShape(
        global_batch_size=loaded.batch.batch_size,
        micro_batch_size=loaded.batch.micro_batch_size,
        data_rank=topology.data_rank,
        data_ranks=topology.data,
        collate=partial(task.collate, collation=_collation(loaded, prepared)),
    )
    order = build_sample_order(loaded, [len(s) for s in train], prepared.weights)
    batches = TrainBatches(train, order, shape, pin)
    num_samples, num_epochs = f"{loaded.steps * shape.global_batch_size:,}", batches.epochs_after(loaded.steps)
    log.info("training reads %s samples of up to %d tokens: %.2f epochs", num_samples, data.sequence_length, num_epochs)
    limit = loaded.config.evaluation.max_batches
    validation_batches = EvaluationBatches(validation, shape, limit, prepared.validation_files) if validation else None
    sources = [tokens.fingerprint() for tokens in prepared.train]
    return Batches(batches, validation_batches, {"sources": sources, "weights": list(prepared.weights)})


def _collation(loaded: LoadedConfig, prepared: PreparedData) -> Collation:
    """Choose the shape and the padding of micro-batches."""
    data, parallel = loaded.config.data, loaded.config.parallel
    tokenizer, is_concatenated = prepared.tokenizer, data.packing == "concatenate"
    special_ids = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None))
    # Concatenated samples keep one shape, which the pipeline engine relies on; a sequence sharded over the tensor
    # ranks must be divisible by their number.
    padded_multiple = math.lcm(PAD_MULTIPLE, parallel.tensor if parallel.sequence_parallel else 1)
    return Collation(
        length=data.sequence_length,
        pad_id=next((token_id for token_id in special_ids if token_id is not None), 0),
        pad_to_multiple_of=data.sequence_length if is_concatenated else padded_multiple,
        mask_padding=not is_concatenated or loaded.facts.has_load_balancing_loss,
    )
