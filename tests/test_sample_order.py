"""The order in which samples are read."""

from __future__ import annotations

import time

import numpy as np
import pytest

from trainer.data.order import SampleOrder, permute

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_permute_is_a_permutation(size: int) -> None:
    images = permute(np.arange(size), size, 5, 0)
    assert sorted(images) == list(range(size))


def test_permute_differs_by_key_and_looks_random() -> None:
    first, second = permute(np.arange(5000), 5000, 5, 0), permute(np.arange(5000), 5000, 5, 1)
    assert (first == second).mean() < 0.005
    assert (first == np.arange(5000)).mean() < 0.005
    # Neighbors must not stay neighbors, and both halves must be mixed.
    assert abs(np.corrcoef(np.arange(5000), first)[0, 1]) < 0.06
    assert abs((first[:2500] < 2500).mean() - 0.5) < 0.04


def test_order_reads_each_sample_once_per_epoch_reshuffled() -> None:
    order = SampleOrder((100, 37), (1.0, 1.0), seed=3)
    epochs = []
    for epoch in range(3):
        source, sample = order.lookup(np.arange(epoch * 137, (epoch + 1) * 137))
        pairs = list(zip(source.tolist(), sample.tolist(), strict=True))
        assert sorted(pairs) == sorted([(0, i) for i in range(100)] + [(1, i) for i in range(37)])
        epochs.append(pairs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_source_weights_scale_samples_per_epoch() -> None:
    order = SampleOrder((100, 10, 100), (1.0, 2.0, 0.5), seed=3)
    assert order.shares == (100, 20, 50)
    read: list[list[int]] = []
    for epoch in range(2):
        source, sample = order.lookup(np.arange(epoch * 170, (epoch + 1) * 170))
        assert sorted(sample[source == 1].tolist()) == sorted([*range(10), *range(10)])
        read.append(sample[source == 2].tolist())
    assert sorted(read[0] + read[1]) == list(range(100)), "two halves without overlap"


def test_order_lookup_takes_constant_time() -> None:
    order = SampleOrder((10**9, 10**7), (1.0, 3.0), seed=1)
    order.lookup(np.arange(1000))

    def cost(start: int) -> float:
        best = float("inf")
        for _ in range(5):
            begin = time.process_time()
            order.lookup(np.arange(start, start + 1000))
            best = min(best, time.process_time() - begin)
        return best

    assert cost(10**12) < 3 * cost(0) + 0.002
