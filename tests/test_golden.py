"""Losses, sample orders, random numbers, initial weights and token files equal those in tests/golden."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import golden
from tests.golden import __main__ as command


@pytest.mark.parametrize("name", golden.CURVES)
def test_losses_of_20_steps_equal_golden(name: str, tmp_path: Path) -> None:
    """The tolerance covers the rounding of another CPU (1e-7 measured); another seed changes a loss by 1e-2."""
    expected, computed = golden.golden("losses")[name], golden.losses(name, tmp_path)
    assert computed["losses"] == pytest.approx(expected["losses"], rel=2e-6)
    assert computed["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert computed["held_out_loss"] == pytest.approx(expected["held_out_loss"], rel=1e-6)


@pytest.mark.fast
@pytest.mark.parametrize("name", golden.ORDERS)
def test_sample_order_equals_golden(name: str) -> None:
    assert golden.sample_orders()[name] == golden.golden("sample_orders")[name]


@pytest.mark.fast
def test_random_streams_equal_golden() -> None:
    assert golden.random_streams() == golden.golden("random_streams")


@pytest.mark.fast
def test_initial_weights_equal_golden() -> None:
    expected, computed = golden.golden("initial_weights"), golden.initial_weights()
    assert computed.keys() == expected.keys()
    for weight, values in expected.items():
        assert computed[weight] == pytest.approx(values, rel=1e-5, abs=1e-7), weight


@pytest.mark.fast
def test_token_file_bytes_equal_golden(tmp_path: Path) -> None:
    assert golden.token_file(tmp_path) == golden.golden("token_file")


@pytest.mark.fast
def test_golden_file_is_not_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    before = (golden.FOLDER / "token_file.json").read_bytes()
    assert command.main(["token_file"]) == 1
    assert "--replace" in capsys.readouterr().err
    assert (golden.FOLDER / "token_file.json").read_bytes() == before
