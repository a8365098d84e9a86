"""How many collectives a layer sends."""

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
    """How many collectives of each kind carry a hidden state or more."""
    counts = measured.outside if outside else measured.layer
    return {word: n for (when, word, size), n in counts.items() if when == during and size >= ACTIVATION}


def small(measured: Measured) -> int:
    """Bytes of a layer's other collectives."""
    return sum(n * size for (_, _, size), n in measured.layer.items() if size < ACTIVATION)


@pytest.mark.parametrize("ranks", [2, 4])
def test_layer_issues_expected_collectives(ranks: int) -> None:
    whole, cut_, *residuals = run_ranks(
        measure, ranks, [Case("llama"), Case("llama", sequence_parallel=True), *PARALLEL_RESIDUALS]
    )[0]
    assert of_hidden_states(whole, "forward") == {"all-reduce": 2}
    assert of_hidden_states(whole, "backward") == {"all-reduce": 2}
    assert small(whole) == 0
    for case, measured in zip(PARALLEL_RESIDUALS, residuals, strict=True):
        assert of_hidden_states(measured, "forward") == {"all-reduce": 1}, case
        assert of_hidden_states(measured, "backward") == {"all-reduce": 1}, case
        assert small(measured) < 0.1 * ACTIVATION, case
    once = {"all-gather": 2, "reduce-scatter": 2}
    assert of_hidden_states(cut_, "forward") == once
    assert of_hidden_states(cut_, "backward") == once
    assert small(cut_) == 2 * 64 * 4, "the gradients of two norms"
    four = 4 * BATCH * LENGTH * 64 * 4 * 2 * (ranks - 1) / ranks
    assert sent(whole.layer, ranks) == four
    assert sent(cut_.layer, ranks) == pytest.approx(four, rel=0.01)
    # The embedding's vectors are summed, and the last layer's output is joined; the other way round, the gradient of
    # the first layer's input is joined, and that of the head's is summed.
    for measured, more in ((whole, {}), (cut_, {"all-gather": 1})):
        for during in ("forward", "backward"):
            assert of_hidden_states(measured, during, outside=True) == {"all-reduce": 1, **more}
        numbers = [(n, size) for (when, _, size), n in measured.outside.items() if when == "loss"]
        assert numbers == [(3, BATCH * LENGTH * 4)]


def each_module_enters_by_itself(cases: list[Case]) -> list[Measured]:
    Region._cached = lambda self, x, make: make()  # type: ignore[method-assign]
    return measure(cases)


def test_extra_collectives_are_detected() -> None:
    (measured,) = run_ranks(each_module_enters_by_itself, 2, [Case("llama")])[0]
    assert of_hidden_states(measured, "backward") == {"all-reduce": 5}
