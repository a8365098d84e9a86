"""Which sample is read when: a pure function of (seed, epoch, position). No iterator, nothing to replay.

A permutation of n samples is a Feistel network on the smallest even number of bits that holds n, with
cycle-walking: a value that falls outside [0, n) is sent through the network again until it falls inside
(Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Any position costs the same, and nothing
of size n is ever stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

_ROUNDS = 6
_MASK = (1 << 64) - 1


def mix(*values: int) -> int:
    """64 well-mixed bits of a few integers (splitmix64's finaliser over a running sum)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state + (value & _MASK) * 0xBF58476D1CE4E5B9 + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def _round_function(value: npt.NDArray[np.uint64], key: int) -> npt.NDArray[np.uint64]:
    value = (value + np.uint64(key)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(32))


def permute(positions: Integers, size: int, *key: int) -> Integers:
    """The images of `positions`, each in [0, size), under the permutation that `key` names."""
    if size <= 1:
        return np.zeros_like(positions)
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    keys = [mix(*key, number) for number in range(_ROUNDS)]
    value = positions.astype(np.uint64)
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():
        walking = value[outside]
        left, right = walking >> half_bits, walking & mask
        for round_key in keys:
            left, right = right, left ^ (_round_function(right, round_key) & mask)
        value[outside] = (left << half_bits) | right
        outside = value >= np.uint64(size)
    return value.astype(np.int64)


@dataclass(frozen=True)
class SampleOrder:
    """The order in which a mixture of sources is read.

    An epoch reads `round(weight x samples)` of each source: 2.0 reads a source twice, each time in a new
    order; 0.5 reads half of it, and the other half in the next epoch. Nothing depends on the world size.
    """

    samples: tuple[int, ...]
    """Samples in each source."""

    weights: tuple[float, ...]
    seed: int

    def __post_init__(self) -> None:
        if len(self.samples) != len(self.weights) or min(self.samples, default=0) < 1:
            raise ValueError(f"every source needs a weight and at least one sample: {self}")

    @property
    def shares(self) -> tuple[int, ...]:
        """Samples that one epoch takes from each source."""
        return tuple(max(1, round(w * n)) for n, w in zip(self.samples, self.weights, strict=True))

    @property
    def epoch_samples(self) -> int:
        return sum(self.shares)

    def epochs_at(self, position: int) -> float:
        """How many epochs lie before `position`, as a fraction."""
        return position / self.epoch_samples

    def lookup(self, positions: Sequence[int] | Integers) -> tuple[Integers, Integers]:
        """(source, sample) at each global position, counted from the start of training.

        Args:
            positions: any global sample positions >= 0, in any order.
        """
        global_positions = np.asarray(positions, dtype=np.int64)
        source, sample = np.empty_like(global_positions), np.empty_like(global_positions)
        epochs = global_positions // self.epoch_samples
        for epoch in np.unique(epochs):
            selected = epochs == epoch
            epoch_positions = permute(
                global_positions[selected] % self.epoch_samples, self.epoch_samples, self.seed, int(epoch), -1
            )
            source[selected], sample[selected] = self._locate(epoch_positions, int(epoch))
        return source, sample

    def _locate(self, epoch_positions: Integers, epoch: int) -> tuple[Integers, Integers]:
        source_ends = np.cumsum(self.shares)
        source = np.searchsorted(source_ends, epoch_positions, side="right").astype(np.int64)
        sample = np.empty_like(epoch_positions)
        for number in np.unique(source):
            selected = source == number
            size, share = self.samples[number], self.shares[number]
            # Counted through all epochs, so that a source is read whole before any of it is read again.
            source_positions = epoch_positions[selected] - (source_ends[number] - share) + epoch * share
            permuted = np.empty_like(source_positions)
            for pass_number in np.unique(source_positions // size):
                is_in_pass = source_positions // size == pass_number
                permuted[is_in_pass] = permute(
                    source_positions[is_in_pass] % size, size, self.seed, int(pass_number), int(number)
                )
            sample[selected] = permuted
        return source, sample
