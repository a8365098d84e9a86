"""From token files to samples: rows of at most `sequence_length + 1` ids."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from trainer.data.indexed import IndexedTokens
from trainer.errors import DataError

Ids = npt.NDArray[Any]


class Samples(Protocol):
    """Samples by number. Inputs are a sample's ids without the last, labels without the first."""

    def __len__(self) -> int: ...

    def ids(self, number: int) -> Ids:
        """At most `sequence_length + 1` ids of sample `number`."""

    def count_targets(self, numbers: npt.NDArray[np.int64]) -> int:
        """Predicted tokens in these samples together, without reading them."""


class ConcatenatedSamples:
    """All documents as one stream, cut every `length` ids; a sample's last id is the next one's first.

    The last sample is as long as what is left: every token but the stream's first is predicted exactly once.
    """

    def __init__(self, tokens: IndexedTokens, length: int, *, drop_last: bool = False) -> None:
        """Args:
            drop_last: leave out the last sample if it is shorter than the others.

        Raises:
            DataError: not one sample.
        """
        self._tokens, self._length = tokens, length
        count_targets = max(0, tokens.tokens - 1)
        self._num_samples = count_targets // length if drop_last else -(-count_targets // length)
        self._last_sample_deficit = max(0, self._num_samples * length - count_targets)
        """Targets that the last sample has fewer than `length`."""

        if self._num_samples < 1 and drop_last:
            raise DataError(
                f"{tokens.bin_path}: {tokens.tokens} tokens, fewer than one sample of data.sequence_length + 1 = "
                f"{length + 1}. Set data.drop_last to false, shorten the sequence or add text"
            )
        if self._num_samples < 1:
            raise DataError(f"{tokens.bin_path}: {tokens.tokens} tokens, and a sample has 2 at least. Add text")

    def __len__(self) -> int:
        return self._num_samples

    def ids(self, number: int) -> Ids:
        return self._tokens.stream(number * self._length, self._length + 1)

    def count_targets(self, numbers: npt.NDArray[np.int64]) -> int:
        return len(numbers) * self._length - self._last_sample_deficit * int((numbers == self._num_samples - 1).sum())


class DocumentSamples:
    """One document a sample, cut at `length + 1` ids. Documents of one token predict nothing and are left out."""

    def __init__(self, tokens: IndexedTokens, length: int) -> None:
        self._tokens, self._length = tokens, length
        self._usable_documents = np.flatnonzero(tokens.lengths >= 2)
        self._targets = np.minimum(tokens.lengths[self._usable_documents], length + 1) - 1
        if not len(self._usable_documents):
            raise DataError(f"{tokens.bin_path}: no document of two tokens or more")

    @property
    def num_truncated(self) -> int:
        """Documents longer than a sample, whose rest is not read."""
        return int((self._tokens.lengths > self._length + 1).sum())

    def __len__(self) -> int:
        return len(self._usable_documents)

    def ids(self, number: int) -> Ids:
        return self._tokens.document(int(self._usable_documents[number]), self._length + 1)

    def count_targets(self, numbers: npt.NDArray[np.int64]) -> int:
        return int(self._targets[numbers].sum(dtype=np.int64))


def build_samples(
    tokens: IndexedTokens, packing: Literal["concatenate", "none"], length: int, *, drop_last: bool
) -> Samples:
    """The samples of one token file under a way of packing."""
    if packing == "concatenate":
        return ConcatenatedSamples(tokens, length, drop_last=drop_last)
    return DocumentSamples(tokens, length)


class CheckedSamples:
    """Samples whose ids are compared with the model's vocabulary as they are read."""

    def __init__(self, samples: Samples, tokens: IndexedTokens, vocabulary: int) -> None:
        self._samples, self._tokens, self._vocabulary = samples, tokens, vocabulary

    def __len__(self) -> int:
        return len(self._samples)

    def ids(self, number: int) -> npt.NDArray[np.int64]:
        """See `Samples.ids`.

        Raises:
            DataError: naming file, sample and place of an id that the model has no embedding for.
        """
        sample_ids = self._samples.ids(number).astype(np.int64)
        if sample_ids.max() >= self._vocabulary or sample_ids.min() < 0:
            index = int(np.flatnonzero((sample_ids >= self._vocabulary) | (sample_ids < 0))[0])
            raise DataError(
                f"{self._tokens.bin_path}: sample {number}, id {index} is {sample_ids[index]}, outside the model's "
                f"vocabulary of {self._vocabulary}. The file was made with another tokenizer, or is damaged"
            )
        return sample_ids

    def count_targets(self, numbers: npt.NDArray[np.int64]) -> int:
        return self._samples.count_targets(numbers)
