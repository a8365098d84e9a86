"""Micro-batches: what one data rank computes on, and how many tokens the global batch predicts.

A global batch is divided into micro-batches in the order of its samples; micro-batch m goes to data rank
m mod R as its number m // R. So the micro-batches are the same sets of samples in every layout of one
micro-batch size, and their union is the same set of samples in every layout at all.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise

import numpy as np
import torch
from torch import Tensor

from trainer.data.order import Integers, SampleOrder
from trainer.data.samples import CheckedSamples

IGNORED = -100
"""The label of a position that predicts nothing (torch's and Hugging Face's convention)."""

PAD_MULTIPLE = 8
"""What the width of a padded micro-batch is a multiple of: it keeps kernels fast and shapes few."""

_PREFETCHED = 4


@dataclass(frozen=True)
class MicroBatch:
    """B rows of T tokens; labels are the inputs shifted by one, padding is `IGNORED`."""

    input_ids_BT: Tensor
    labels_BT: Tensor
    attention_mask_BT: Tensor | None
    """1 where there is a token; None where every position holds one, or where padding needs no mask."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`, copied without waiting where the memory is pinned."""
        mask = self.attention_mask_BT
        return MicroBatch(
            self.input_ids_BT.to(device, non_blocking=True),
            self.labels_BT.to(device, non_blocking=True),
            None if mask is None else mask.to(device, non_blocking=True),
        )

    def pinned(self) -> MicroBatch:
        mask = self.attention_mask_BT
        return MicroBatch(
            self.input_ids_BT.pin_memory(), self.labels_BT.pin_memory(), None if mask is None else mask.pin_memory()
        )


@dataclass(frozen=True)
class StepBatch:
    """What one data rank needs for one optimizer step."""

    micro_batches: tuple[MicroBatch, ...]
    tokens: int
    """Predicted tokens of the whole global batch, over all ranks and micro-batches: the weight of the loss."""

    samples: int
    """Samples of the whole global batch."""


def pad(
    rows: list[np.ndarray[tuple[int], np.dtype[np.int64]]],
    length: int,
    pad_id: int,
    multiple: int = PAD_MULTIPLE,
    *,
    masks: bool = True,
) -> MicroBatch:
    """Rows of 2 to `length + 1` ids as one micro-batch, padded on the right to a common length: a multiple of
    `multiple`, or `length`. See `BatchShape.masks`."""
    longest = max(len(row) for row in rows) - 1
    width = min(length, -(-longest // multiple) * multiple)
    inputs = np.full((len(rows), width), pad_id, np.int64)
    labels = np.full((len(rows), width), IGNORED, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for place, row in enumerate(rows):
        count = len(row) - 1
        inputs[place, :count] = row[:-1]
        labels[place, :count] = row[1:]
        mask[place, :count] = 1
    shown = torch.from_numpy(mask) if masks and not mask.all() else None
    return MicroBatch(torch.from_numpy(inputs), torch.from_numpy(labels), shown)


@dataclass(frozen=True)
class BatchShape:
    """How a global batch is divided, and which part is this rank's."""

    train: int
    """Samples of a global batch."""

    micro: int
    """Samples of a micro-batch."""

    data_rank: int
    data_ranks: int
    length: int
    """`data.sequence_length`."""

    pad_id: int
    multiple: int = PAD_MULTIPLE
    """What the width of a padded micro-batch is a multiple of, unless it is `length`."""

    masks: bool = True
    """Whether padding is masked out. Under a causal mask no token attends to the padding after it, so the loss and its
    gradients need no mask; a load-balancing loss, which counts all tokens, does."""

    def padded(self, rows: list[np.ndarray[tuple[int], np.dtype[np.int64]]]) -> MicroBatch:
        """The rows as one micro-batch of this shape."""
        return pad(rows, self.length, self.pad_id, self.multiple, masks=self.masks)


class TrainBatches:
    """The training data as a function from step to batch, and an iterator that reads ahead in a thread."""

    def __init__(self, sources: list[CheckedSamples], order: SampleOrder, shape: BatchShape, pin: bool) -> None:
        self._sources, self._order, self._shape, self._pin = sources, order, shape, pin
        self._ahead = 0
        """Samples read in earlier steps beside those of this batch size."""

    def go_on_after(self, step: int, samples: int) -> None:
        """Makes the step behind `step` begin with sample number `samples`, whatever the batch size was before."""
        self._ahead = samples - step * self._shape.train

    def epoch_after(self, step: int) -> float:
        """Epochs read after `step` steps."""
        return self._order.epoch_of(step * self._shape.train + self._ahead)

    def first_ids(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """At most `length + 1` ids of the first source's first sample: the same on every rank."""
        return self._sources[0].ids(0)

    def at(self, step: int) -> StepBatch:
        """The batch of step `step`, counted from 1. A pure function: any step costs the same.

        Raises:
            DataError: an id outside the vocabulary.
        """
        shape = self._shape
        first = (step - 1) * shape.train + self._ahead
        source, sample = self._order.at(np.arange(first, first + shape.train))
        stride = shape.micro * shape.data_ranks
        own = [
            self._micro_batch(source, sample, start)
            for start in range(shape.data_rank * shape.micro, shape.train, stride)
        ]
        return StepBatch(tuple(own), self._targets(source, sample), shape.train)

    def _micro_batch(self, source: Integers, sample: Integers, start: int) -> MicroBatch:
        places = range(start, start + self._shape.micro)
        rows = [self._sources[source[p]].ids(int(sample[p])) for p in places]
        batch = self._shape.padded(rows)
        return batch.pinned() if self._pin else batch

    def _targets(self, source: Integers, sample: Integers) -> int:
        return sum(found.targets(sample[source == number]) for number, found in enumerate(self._sources))

    def steps(self, first: int, last: int) -> Iterator[StepBatch]:
        """The batches of steps `first` to `last`, read ahead by a thread. Errors of the thread are raised here."""
        ready: queue.Queue[StepBatch | BaseException] = queue.Queue(_PREFETCHED)
        stopped = threading.Event()

        def put(item: StepBatch | BaseException) -> bool:
            while not stopped.is_set():
                try:
                    ready.put(item, timeout=0.5)
                except queue.Full:
                    continue
                return True
            return False

        def read() -> None:
            try:
                for step in range(first, last + 1):
                    if not put(self.at(step)):
                        return
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=read, name="batches", daemon=True)
        thread.start()
        try:
            for _ in range(first, last + 1):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()


def evaluated_samples(samples: Sequence[int], batch: int, max_batches: int | None) -> list[int]:
    """How many samples of each source are evaluated.

    Args:
        samples: that each source has. batch: samples of a global batch. max_batches: None for all samples.

    Returns:
        Shares of max_batches x batch in proportion to `samples`, but at least one batch of each source, or all that
        it has.
    """
    if max_batches is None or max_batches * batch >= sum(samples):
        return list(samples)
    shares = [min(count, batch) for count in samples]
    larger = list(range(len(samples)))
    while True:  # sources whose share in proportion is less than a batch keep that, and the others share the rest
        rest = max_batches * batch - sum(shares[n] for n in range(len(samples)) if n not in larger)
        total = sum(samples[n] for n in larger)
        kept = [n for n in larger if rest * samples[n] >= shares[n] * total]
        if kept == larger:
            break
        larger = kept
    ends = [0, *accumulate(samples[n] for n in larger)]
    rounded = [(2 * rest * end + total) // (2 * total) if larger else 0 for end in ends]
    for n, (start, end) in zip(larger, pairwise(rounded), strict=True):
        shares[n] = end - start
    return shares


class EvaluationBatches:
    """Held-out data: of each source the first samples, each exactly once, in order, whatever the number of ranks.

    All ranks yield the same number of micro-batches (ZeRO-3 gathers weights in each forward pass); where the
    samples run out, a rank yields one whose labels are all ignored.
    """

    def __init__(
        self,
        files: list[CheckedSamples],
        shape: BatchShape,
        max_batches: int | None,
        files_of_source: Sequence[int] | None = None,
    ) -> None:
        """Args:
        files_of_source: how many of `files`, in their order, make each source. Default: one each.
        """
        self._files, self._shape = files, shape
        sizes = iter([len(samples) for samples in files])
        sources = [list(islice(sizes, count)) for count in files_of_source or [1] * len(files)]
        shares = evaluated_samples([sum(source) for source in sources], shape.train, max_batches)
        ends = [min(end, share) for source, share in zip(sources, shares, strict=True) for end in accumulate(source)]
        firsts = np.repeat(np.cumsum([0, *shares[:-1]]), [len(source) for source in sources])
        self._borders = np.asarray(ends) + firsts
        """Of each file: evaluated samples up to its last one."""

        self.shares = tuple(shares)
        """Evaluated samples of each source."""

        self.samples = sum(shares)

    def _ids(self, number: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        file = int(np.searchsorted(self._borders, number, side="right"))
        first = int(self._borders[file - 1]) if file else 0
        return self._files[file].ids(number - first)

    def __iter__(self) -> Iterator[MicroBatch]:
        shape = self._shape
        rounds = -(-self.samples // (shape.micro * shape.data_ranks))
        for number in range(rounds):
            start = (number * shape.data_ranks + shape.data_rank) * shape.micro
            rows = [self._ids(p) for p in range(start, min(start + shape.micro, self.samples))]
            if rows:
                yield shape.padded(rows)
            else:
                idle = shape.padded([self._ids(0)])
                yield MicroBatch(idle.input_ids_BT, torch.full_like(idle.labels_BT, IGNORED), idle.attention_mask_BT)
