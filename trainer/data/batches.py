"""Micro-batches of one data rank, and the number of tokens that the global batch predicts.

A global batch is split into micro-batches in sample order. With R data ranks, micro-batch m goes to data rank m mod R,
where it has index m // R. Micro-batches of a given size therefore hold the same samples in every layout, and the global
batch holds the same samples whatever the layout and the micro-batch size.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise

import numpy as np

from trainer.data.order import Integers, SampleOrder
from trainer.data.samples import CheckedSamples
from trainer.tasks import MicroBatch
from trainer.tasks.interface import Ids

_PREFETCH_STEPS = 4


@dataclass(frozen=True)
class StepBatch:
    """Micro-batches of one data rank for one optimizer step, with totals of the global batch."""

    micro_batches: tuple[MicroBatch, ...]
    tokens: int
    """Predicted tokens of the global batch, over all ranks and micro-batches: the denominator of the loss."""

    samples: int
    """Samples of the global batch."""


@dataclass(frozen=True)
class BatchShape:
    """How a global batch is split into micro-batches, and which of them belong to this rank."""

    global_batch_size: int
    """Samples of a global batch."""

    micro_batch_size: int
    """Samples of a micro-batch."""

    data_rank: int
    data_ranks: int
    collate: Callable[[Sequence[Ids]], MicroBatch]
    """Collates samples into a micro-batch: the task's collation, with the run's padding."""


class TrainBatches:
    """Training data as a pure function from step to batch, and an iterator that prefetches in a thread."""

    def __init__(self, sources: list[CheckedSamples], order: SampleOrder, shape: BatchShape, pin: bool) -> None:
        self._sources, self._order, self._shape, self._pin = sources, order, shape, pin
        self._sample_offset = 0
        """Samples that earlier steps read in excess of `step * global_batch_size`, at another batch size."""

    def resume_from(self, step: int, samples: int) -> None:
        """Start the step after `step` at global sample position `samples`, whatever the batch size was before."""
        self._sample_offset = samples - step * self._shape.global_batch_size

    def epochs_after(self, step: int) -> float:
        """Return the number of epochs, as a fraction, that have been read after `step` steps."""
        return self._order.epochs_at(step * self._shape.global_batch_size + self._sample_offset)

    def first_ids(self) -> Ids:
        """Return up to `length + 1` ids of the first sample of the first source: the same on every rank."""
        return self._sources[0].ids(0)

    def batch_at(self, step: int) -> StepBatch:
        """Return the batch of step `step`, counted from 1. Any step costs the same.

        Raises:
            DataError: an id outside the vocabulary.
        """
        shape = self._shape
        first = (step - 1) * shape.global_batch_size + self._sample_offset
        source, sample = self._order.lookup(np.arange(first, first + shape.global_batch_size))
        stride = shape.micro_batch_size * shape.data_ranks
        micro_batches = [
            self._micro_batch(source, sample, start)
            for start in range(shape.data_rank * shape.micro_batch_size, shape.global_batch_size, stride)
        ]
        return StepBatch(tuple(micro_batches), self._count_targets(source, sample), shape.global_batch_size)

    def _micro_batch(self, source: Integers, sample: Integers, start: int) -> MicroBatch:
        indices = range(start, start + self._shape.micro_batch_size)
        rows = [self._sources[source[p]].ids(int(sample[p])) for p in indices]
        batch = self._shape.collate(rows)
        return batch.pinned() if self._pin else batch

    def _count_targets(self, source: Integers, sample: Integers) -> int:
        return sum(samples.count_targets(sample[source == number]) for number, samples in enumerate(self._sources))

    def steps(self, first: int, last: int) -> Iterator[StepBatch]:
        """Yield the batches of steps `first` to `last`, prefetched by a thread whose errors are raised here."""
        ready: queue.Queue[StepBatch | BaseException] = queue.Queue(_PREFETCH_STEPS)
        stopped = threading.Event()

        def put(item: StepBatch | BaseException) -> bool:
            while not stopped.is_set():
                try:
                    ready.put(item, timeout=0.5)
                except queue.Full:
                    continue
                return True
            return False

        def read_ahead() -> None:
            try:
                for step in range(first, last + 1):
                    if not put(self.batch_at(step)):
                        return
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=read_ahead, name="batches", daemon=True)
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


def allocate_evaluation_samples(samples: Sequence[int], batch: int, max_batches: int | None) -> list[int]:
    """Choose how many samples of each source an evaluation reads.

    Args:
        samples: samples of each source.
        batch: samples of a global batch.
        max_batches: limit on the number of global batches; None to read all samples.

    Returns:
        `max_batches * batch` samples, allocated in proportion to `samples`, but for each source at least one batch or
        all of its samples.
    """
    if max_batches is None or max_batches * batch >= sum(samples):
        return list(samples)
    shares = [min(count, batch) for count in samples]
    proportional = list(range(len(samples)))
    # Sources whose proportional share is below one batch keep their minimum; the others divide the rest among them.
    # Fixing one source at its minimum lowers the share of the others, hence the loop.
    while True:
        rest = max_batches * batch - sum(shares[n] for n in range(len(samples)) if n not in proportional)
        total = sum(samples[n] for n in proportional)
        kept = [n for n in proportional if rest * samples[n] >= shares[n] * total]
        if kept == proportional:
            break
        proportional = kept
    ends = [0, *accumulate(samples[n] for n in proportional)]
    rounded = [(2 * rest * end + total) // (2 * total) if proportional else 0 for end in ends]
    for n, (start, end) in zip(proportional, pairwise(rounded), strict=True):
        shares[n] = end - start
    return shares


class EvaluationBatches:
    """Validation data: the first samples of each source, each exactly once and in order, for any number of ranks.

    All ranks yield the same number of micro-batches, because ZeRO-3 gathers weights in each forward pass. A rank
    without samples left yields a micro-batch whose labels are all ignored.
    """

    def __init__(
        self,
        files: list[CheckedSamples],
        shape: BatchShape,
        max_batches: int | None,
        files_of_source: Sequence[int] | None = None,
    ) -> None:
        """Allocate the evaluated samples to the sources.

        Args:
            files: samples of each token file.
            shape: how a global batch is split.
            max_batches: limit on the number of global batches; None to read all samples.
            files_of_source: number of consecutive `files` that make up each source. Default: one each.
        """
        self._files, self._shape = files, shape
        sizes = iter([len(samples) for samples in files])
        sources = [list(islice(sizes, count)) for count in files_of_source or [1] * len(files)]
        shares = allocate_evaluation_samples([sum(source) for source in sources], shape.global_batch_size, max_batches)
        ends = [min(end, share) for source, share in zip(sources, shares, strict=True) for end in accumulate(source)]
        firsts = np.repeat(np.cumsum([0, *shares[:-1]]), [len(source) for source in sources])
        self._file_ends = np.asarray(ends) + firsts
        """Cumulative number of evaluated samples at the end of each file."""

        self.shares = tuple(shares)
        """Evaluated samples of each source."""

        self.samples = sum(shares)

    def _read_ids(self, number: int) -> Ids:
        file = int(np.searchsorted(self._file_ends, number, side="right"))
        first = int(self._file_ends[file - 1]) if file else 0
        return self._files[file].ids(number - first)

    def __iter__(self) -> Iterator[MicroBatch]:
        shape = self._shape
        rounds = -(-self.samples // (shape.micro_batch_size * shape.data_ranks))
        for number in range(rounds):
            start = (number * shape.data_ranks + shape.data_rank) * shape.micro_batch_size
            rows = [self._read_ids(p) for p in range(start, min(start + shape.micro_batch_size, self.samples))]
            if rows:
                yield shape.collate(rows)
            else:
                yield shape.collate([self._read_ids(0)]).without_targets()
