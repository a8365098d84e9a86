"""Sample order as a pure function of (seed, epoch, position), so that resuming replays nothing.

A permutation of n samples is a Feistel network on the smallest even number of bits that holds n, with cycle-walking: a
value outside [0, n) passes through the network again until it is inside (Black and Rogaway, "Ciphers with Arbitrary
Finite Domains", 2002). Every position takes constant time, and nothing of size n is stored.
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
    """Hash integers to 64 bits (the finalizer of splitmix64 over a running sum)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state + (value & _MASK) * 0xBF58476D1CE4E5B9 + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def _round_function(value: npt.NDArray[np.uint64], key: int) -> npt.NDArray[np.uint64]:
    """Apply the round function of the Feistel network: any function works, invertible or not."""
    value = (value + np.uint64(key)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(32))


def permute(positions: Integers, size: int, *key: int) -> Integers:
    """Map `positions`, each in [0, size), through the permutation of [0, size) selected by `key`."""
    if size <= 1:
        return np.zeros_like(positions)
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    keys = [mix(*key, number) for number in range(_ROUNDS)]
    value = positions.astype(np.uint64)
    outside = np.ones(value.shape, dtype=bool)
    # The network permutes [0, 4^half_bits), which is less than four times `size`. Walking the cycle of each value until
    # it is back in [0, size) restricts that permutation to one of [0, size), in fewer than four rounds on average.
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
    """Order in which a mixture of sources is read, independent of the number of ranks.

    An epoch reads `round(weight * samples)` samples of each source: with weight 2.0 it reads the source twice, in two
    different orders; with 0.5 it reads one half, and the next epoch reads the other half.
    """

    samples: tuple[int, ...]
    """Number of samples of each source."""

    weights: tuple[float, ...]
    seed: int

    def __post_init__(self) -> None:
        if len(self.samples) != len(self.weights) or min(self.samples, default=0) < 1:
            raise ValueError(f"every source needs a weight and at least one sample: {self}")

    @property
    def shares(self) -> tuple[int, ...]:
        """Number of samples that an epoch reads from each source."""
        return tuple(max(1, round(w * n)) for n, w in zip(self.samples, self.weights, strict=True))

    @property
    def epoch_samples(self) -> int:
        """Number of samples of an epoch."""
        return sum(self.shares)

    def epochs_at(self, position: int) -> float:
        """Return the number of epochs before `position`, as a fraction."""
        return position / self.epoch_samples

    def lookup(self, positions: Sequence[int] | Integers) -> tuple[Integers, Integers]:
        """Return (source index, sample index within the source) of each global position.

        Args:
            positions: positions >= 0 counted from the start of training, in any order.
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
            # Positions within the source count through all epochs, so that every sample of the source is read once
            # before any is read again, even if the weight is not an integer.
            source_positions = epoch_positions[selected] - (source_ends[number] - share) + epoch * share
            permuted = np.empty_like(source_positions)
            for pass_number in np.unique(source_positions // size):
                is_in_pass = source_positions // size == pass_number
                permuted[is_in_pass] = permute(
                    source_positions[is_in_pass] % size, size, self.seed, int(pass_number), int(number)
                )
            sample[selected] = permuted
        return source, sample
