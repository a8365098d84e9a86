"""Environment and logs of ranks, as launchers start them."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from tests.harness import run_command
from trainer import distributed
from trainer.distributed import (
    Launch,
    configure_logging,
)
from trainer.errors import ConfigError

TRAIN = str(Path(__file__).parent.parent / "launch" / "train.py")


@pytest.mark.fast
def test_launch_reads_the_variables_of_each_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Launch.from_environment() == Launch(0, 1, 0, 1)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert Launch.from_environment() == Launch(5, 8, 1, 4)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"RANK": "abc"}, "RANK: must be a number from 0 to 0 (got 'abc')"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK: must be a number from 0 to 1 (got '-1')"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: must be a number from 0 to 1 (got '2')"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: must be a number of at least 1 (got '0')"),
        ({"WORLD_SIZE": "9" * 400}, "WORLD_SIZE: must be a number of at least 1 (got '999"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "LOCAL_RANK: must be a number from 0 to 1 (got 'x')"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "2"}, "LOCAL_RANK: must be a number from 0 to 1"),
        ({"WORLD_SIZE": "4", "LOCAL_SIZE": "5"}, "LOCAL_SIZE: must be a number from 1 to 4 (got '5')"),
        ({"RANK": ""}, "RANK: must be a number from 0 to 0 (got '')"),
    ],
)
def test_launch_rejects_an_invalid_environment(
    values: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as raised:
        Launch.from_environment()
    assert message in str(raised.value)
    assert len(raised.value.problems) == 1


def test_train_command_exits_2_on_an_invalid_environment() -> None:
    ended = run_command(TRAIN, "--config", "x.json", environment={"RANK": "abc"})
    assert (ended.status, "Traceback" in ended.err) == (2, False)
    assert "error: RANK: must be a number from 0 to 0 (got 'abc')" in ended.err


@pytest.mark.fast
def test_configure_logging_prints_on_rank_zero_and_writes_on_every_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = logging.getLogger("trainer.something")
    for rank in (0, 1):
        configure_logging(rank, tmp_path)
        log.info("hello from %d", rank)
    configure_logging(1)
    assert capsys.readouterr().out == "[tessera] hello from 0\n"
    assert "hello from 1" in (tmp_path / "rank-1.log").read_text()
    logging.getLogger("trainer").handlers.clear()


@pytest.mark.fast
def test_prepare_environment_keeps_existing_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/elsewhere")
    distributed.prepare_environment()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == "/elsewhere"
    assert distributed.local_device() == "cpu"
