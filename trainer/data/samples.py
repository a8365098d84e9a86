"""Samples whose ids are checked as they are read."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trainer.data.indexed import IndexedTokens
from trainer.errors import DataError
from trainer.tasks import Samples


class CheckedSamples:
    """Samples whose ids are checked against the model's vocabulary when they are read."""

    def __init__(self, samples: Samples, tokens: IndexedTokens, vocabulary: int) -> None:
        self._samples, self._tokens, self._vocabulary = samples, tokens, vocabulary

    def __len__(self) -> int:
        return len(self._samples)

    def ids(self, number: int) -> npt.NDArray[np.int64]:
        """Return the ids of sample `number`.

        Raises:
            DataError: an id is outside the vocabulary; the message names file, sample and position.
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
