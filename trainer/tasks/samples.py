"""Samples of language modeling: up to `sequence_length + 1` ids, of which inputs and labels overlap."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from trainer.errors import DataError
from trainer.tasks.interface import Samples, StoredIds, TokenDocuments


class ConcatenatedSamples:
    """Samples of all documents joined into one stream; the last id of a sample is the first of the next one.

    The last sample may be shorter, so that every token but the first of the stream is predicted exactly once.
    """

    def __init__(self, tokens: TokenDocuments, length: int, *, drop_last: bool = False) -> None:
        """Compute the number of samples.

        Args:
            tokens: contiguous token files.
            length: `data.sequence_length`.
            drop_last: omit the last sample if it is shorter than the others.

        Raises:
            DataError: the stream is too short for one sample.
        """
        self._tokens, self._length = tokens, length
        num_targets = max(0, tokens.tokens - 1)
        self._num_samples = num_targets // length if drop_last else -(-num_targets // length)
        self._last_sample_deficit = max(0, self._num_samples * length - num_targets)
        """Predicted tokens that the last sample lacks compared with a full one."""

        if self._num_samples < 1 and drop_last:
            raise DataError(
                f"{tokens.bin_path}: {tokens.tokens} tokens, fewer than one sample of data.sequence_length + 1 = "
                f"{length + 1}. Set data.drop_last to false, shorten the sequence or add text"
            )
        if self._num_samples < 1:
            raise DataError(f"{tokens.bin_path}: {tokens.tokens} tokens, and a sample has 2 at least. Add text")

    @property
    def num_truncated(self) -> int:
        """See `Samples.num_truncated`."""
        return 0

    def __len__(self) -> int:
        return self._num_samples

    def ids(self, number: int) -> StoredIds:
        """See `Samples.ids`."""
        return self._tokens.stream(number * self._length, self._length + 1)

    def count_targets(self, numbers: npt.NDArray[np.int64]) -> int:
        """See `Samples.count_targets`."""
        return len(numbers) * self._length - self._last_sample_deficit * int((numbers == self._num_samples - 1).sum())


class DocumentSamples:
    """One document per sample, truncated to `length + 1` ids. Documents of fewer than two tokens are omitted."""

    def __init__(self, tokens: TokenDocuments, length: int) -> None:
        self._tokens, self._length = tokens, length
        self._usable_documents = np.flatnonzero(tokens.lengths >= 2)
        self._targets = np.minimum(tokens.lengths[self._usable_documents], length + 1) - 1
        if not len(self._usable_documents):
            raise DataError(f"{tokens.bin_path}: no document of two tokens or more")

    @property
    def num_truncated(self) -> int:
        """Documents longer than `length + 1` ids, whose remaining ids are not read."""
        return int((self._tokens.lengths > self._length + 1).sum())

    def __len__(self) -> int:
        return len(self._usable_documents)

    def ids(self, number: int) -> StoredIds:
        """See `Samples.ids`."""
        return self._tokens.document(int(self._usable_documents[number]), self._length + 1)

    def count_targets(self, numbers: npt.NDArray[np.int64]) -> int:
        """See `Samples.count_targets`."""
        return int(self._targets[numbers].sum(dtype=np.int64))


def build_samples(
    tokens: TokenDocuments, packing: Literal["concatenate", "none"], length: int, *, drop_last: bool
) -> Samples:
    """Open the samples of one token file for `data.packing`."""
    if packing == "concatenate":
        return ConcatenatedSamples(tokens, length, drop_last=drop_last)
    return DocumentSamples(tokens, length)
