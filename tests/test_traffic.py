"""Collectives of a layer: how many, and how many bytes."""

from __future__ import annotations

import pytest

from tests.harness import run_ranks
from tools.bench.traffic import ACTIVATION, BATCH, LENGTH, Case, Measured, measure, sent
from trainer.tensor_parallel.region import Region

PARALLEL_RESIDUALS = [
    *(Case(model_type) for model_type in ("gpt_neox", "gptj", "falcon", "phi", "cohere")),
    Case("falcon", {"new_decoder_architecture": True, "num_kv_heads": 4}),
]


def of_hidden_states(measured: Measured, during: str, *, outside: bool = False) -> dict[str, int]:
    """Return how many collectives of each operation carry a hidden state or more."""
    counts = measured.outside if outside else measured.layer
    return {operation: n for (when, operation, size), n in counts.items() if when == during and size >= ACTIVATION}


def small_bytes(measured: Measured) -> int:
    """Return the bytes of a layer's other collectives."""
    return sum(n * size for (_, _, size), n in measured.layer.items() if size < ACTIVATION)


@pytest.mark.parametrize("ranks", [2, 4])
def test_layer_issues_expected_collectives(ranks: int) -> None:
    plain, sharded_sequence, *residuals = run_ranks(
        measure, ranks, [Case("llama"), Case("llama", sequence_parallel=True), *PARALLEL_RESIDUALS]
    )[0]
    assert of_hidden_states(plain, "forward") == {"all-reduce": 2}
    assert of_hidden_states(plain, "backward") == {"all-reduce": 2}
    assert small_bytes(plain) == 0
    for case, measured in zip(PARALLEL_RESIDUALS, residuals, strict=True):
        assert of_hidden_states(measured, "forward") == {"all-reduce": 1}, case
        assert of_hidden_states(measured, "backward") == {"all-reduce": 1}, case
        assert small_bytes(measured) < 0.1 * ACTIVATION, case
    once = {"all-gather": 2, "reduce-scatter": 2}
    assert of_hidden_states(sharded_sequence, "forward") == once
    assert of_hidden_states(sharded_sequence, "backward") == once
    assert small_bytes(sharded_sequence) == 2 * 64 * 4, "the gradients of two norms"
    four = 4 * BATCH * LENGTH * 64 * 4 * 2 * (ranks - 1) / ranks
    assert sent(plain.layer, ranks) == four
    assert sent(sharded_sequence.layer, ranks) == pytest.approx(four, rel=0.01)
    # Forward, the embedding's vectors are summed, and the last layer's output is gathered. Backward, the gradient of
    # the first layer's input is gathered, and that of the head's input is summed.
    for measured, more in ((plain, {}), (sharded_sequence, {"all-gather": 1})):
        for during in ("forward", "backward"):
            assert of_hidden_states(measured, during, outside=True) == {"all-reduce": 1, **more}
        numbers = [(n, size) for (when, _, size), n in measured.outside.items() if when == "loss"]
        assert numbers == [(3, BATCH * LENGTH * 4)]


def measure_without_cache(cases: list[Case]) -> list[Measured]:
    Region._cached = lambda self, x, compute: compute()  # type: ignore[method-assign]
    return measure(cases)


def test_extra_collectives_are_detected() -> None:
    (measured,) = run_ranks(measure_without_cache, 2, [Case("llama")])[0]
    assert of_hidden_states(measured, "backward") == {"all-reduce": 5}
