"""The registry of trackers: states survive a resume, and no tracker ends a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from launch.train import train
from tests.commands import read_rows
from tests.configs import with_values
from tests.harness import captured_messages, run_ranks
from trainer.checkpoint_format import read_manifest
from trainer.config.load import check_config
from trainer.distributed import Launch
from trainer.errors import ConfigError, Problem
from trainer.fault_tolerance import StopRequests
from trainer.run_directory import RunDirectory
from trainer.tracking import TRACKERS, Row, TrackerContext, Trackers, open_trackers

ROW: Row = {
    "step": 1,
    "split": "train",
    "loss": 1.0,
    "grad_norm": 1.0,
    "learning_rate": 0.1,
    "step_seconds": 1.0,
    "tokens_per_second": 1.0,
    "mfu": None,
    "memory_bytes_max": 1,
    "data_wait_seconds": 0.0,
}


class RowCounter:
    """Counts the rows of all attempts."""

    def __init__(self, context: TrackerContext) -> None:
        self._rows = int(context.state.get("rows", "0"))

    def log(self, row: Row) -> None:
        self._rows += 1

    def state(self) -> Mapping[str, str]:
        return {"rows": str(self._rows)}

    def close(self, exit_status: int) -> None:
        pass


class Failing:
    """Raises in one of its methods, from the second call on."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.calls: list[str] = []

    def _call(self, method: str) -> None:
        self.calls.append(method)
        if method == self.method and self.calls.count(method) > 1:
            raise ValueError(f"{method} failed\nsecond line")

    def log(self, row: Row) -> None:
        self._call("log")

    def state(self) -> Mapping[str, str]:
        self._call("state")
        return {"calls": str(len(self.calls))}

    def close(self, exit_status: int) -> None:
        self.calls.append("close")
        if self.method == "close":
            raise ValueError("close failed")


def context(tiny: dict[str, Any], tmp_path: Path) -> tuple[Any, RunDirectory]:
    (tmp_path / "run").mkdir(exist_ok=True)
    return check_config(tiny, world_size=1, device="cpu"), RunDirectory(tmp_path / "run", 1, None)


@pytest.mark.fast
@pytest.mark.parametrize("method", ["log", "state"])
def test_failing_tracker_is_disabled_after_one_warning(method: str) -> None:
    failing, rows = Failing(method), []

    class Recorder(Failing):
        def log(self, row: Row) -> None:
            rows.append(row)

    with captured_messages("trainer.tracking.interface") as messages:
        with Trackers({"failing": failing, "recorder": Recorder("")}, {"failing": {"id": "7"}}) as trackers:
            for _ in range(3):
                trackers.log(ROW)
                trackers.states()
        assert messages == [f"tracker 'failing' disabled after an error: {method} failed. Training continues"]
    assert rows == [ROW] * 3, "the others receive every row"
    assert failing.calls.count(method) == 2
    assert failing.calls[-1] == "close"
    assert trackers.states()["failing"] == {"calls": "2"}, "the last state is kept for a later attempt"


@pytest.mark.fast
def test_tracker_that_fails_to_close_does_not_hide_the_error_of_the_run() -> None:
    def run() -> None:
        with Trackers({"failing": Failing("close")}):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()


@pytest.mark.fast
def test_state_of_tracker_that_is_not_open_is_kept() -> None:
    trackers = Trackers({"failing": Failing("")}, {"other": {"id": "7"}})
    assert trackers.states() == {"other": {"id": "7"}, "failing": {"calls": "1"}}


@pytest.mark.fast
@pytest.mark.parametrize("error", [ImportError("no module"), ConfigError(Problem("run.output_dir", "is full"))])
def test_tracker_that_fails_to_open_is_disabled_unless_the_user_must_act(
    error: Exception, tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(_: TrackerContext) -> RowCounter:
        raise error

    loaded, directory = context(tiny, tmp_path)
    monkeypatch.setitem(TRACKERS, "failing", raises)
    if isinstance(error, ConfigError):
        with pytest.raises(ConfigError):
            open_trackers(loaded, directory, is_rank_zero=True)
        return
    with captured_messages("trainer.tracking.registry") as messages:
        open_trackers(loaded, directory, is_rank_zero=True).log(ROW)
        assert messages == ["tracker 'failing' disabled after an error: no module. Training continues"]
    assert len(read_rows(tmp_path / "run")) == 1


@pytest.mark.fast
def test_ranks_other_than_zero_have_no_trackers(tiny: dict[str, Any], tmp_path: Path) -> None:
    loaded, directory = context(tiny, tmp_path)
    open_trackers(loaded, directory, is_rank_zero=False).log(ROW)
    assert not directory.metrics.exists()


def train_with_trackers(config: dict[str, Any]) -> list[str]:
    """Train as the command does, with a tracker that counts and one that raises; return the warnings."""
    TRACKERS["counter"] = RowCounter
    TRACKERS["failing"] = lambda _: Failing("log")
    launch = Launch.from_environment()
    with captured_messages("trainer.tracking.interface") as messages:
        loaded = check_config(config, world_size=launch.world_size, device="cpu")
        train(loaded, launch, StopRequests(launch.rank))
        return list(messages)


def test_tracker_state_survives_resume_and_failing_tracker_does_not_end_run(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    config = with_values(tiny, training__log_every_steps=1, checkpoint__every_steps=2)
    run = tmp_path / "run"
    for steps in (2, 4):
        warnings = run_ranks(train_with_trackers, 1, with_values(config, training__max_steps=steps))[0]
        assert warnings == ["tracker 'failing' disabled after an error: log failed. Training continues"]
        states = read_manifest(run / "checkpoints" / f"step-{steps:08}").trackers
        assert states["counter"] == {"rows": str(len(read_rows(run)))}
    assert {row["attempt"] for row in read_rows(run)} == {1, 2}
