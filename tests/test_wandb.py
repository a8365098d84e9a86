"""Weights & Biases never blocks or ends a run."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest

from trainer.config.schema import WandbSection
from trainer.tracking.wandb import Wandb


class _Slow:
    """A `wandb` whose init takes half a second; records what is logged."""

    Settings = dict
    rows: ClassVar[list[dict[str, Any]]] = []

    @classmethod
    def init(cls, **_: Any) -> Any:
        time.sleep(0.5)
        return cls

    @classmethod
    def log(cls, row: dict[str, Any]) -> None:
        cls.rows.append(row)

    @staticmethod
    def define_metric(*_: Any, **__: Any) -> None: ...

    @staticmethod
    def finish(**_: Any) -> None: ...


@pytest.mark.fast
def test_wandb_row_has_time_of_log_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the time at which the thread passes it on."""
    monkeypatch.setitem(sys.modules, "wandb", _Slow)
    _Slow.rows.clear()
    tracker = Wandb(WandbSection(mode="offline"), name="n", folder=tmp_path, config={})
    times = []
    for step in (1, 2):
        times.append(time.time())
        tracker.log({"step": step, "split": "train", "loss": 1.0})
        time.sleep(0.1)
    tracker.close(0)
    assert [row["_timestamp"] for row in _Slow.rows] == pytest.approx(times, abs=0.05)
    assert [row["train/loss"] for row in _Slow.rows] == [1.0, 1.0]


class _Hangs:
    """A `wandb` whose init never returns."""

    Settings = dict

    @staticmethod
    def init(**_: Any) -> None:
        time.sleep(3600)


class _Fails:
    Settings = dict

    @staticmethod
    def init(**_: Any) -> None:
        raise OSError("no space left on device")


@pytest.mark.fast
def test_wandb_never_blocks_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("trainer.tracking.wandb._CLOSE_SECONDS", {"online": 0.5})
    monkeypatch.setattr(logging.getLogger("trainer"), "propagate", True)
    for module, message in ((_Hangs, "did not finish within"), (_Fails, "no space left on device")):
        monkeypatch.setitem(sys.modules, "wandb", module)
        start = time.monotonic()
        tracker = Wandb(WandbSection(mode="online"), name="n", folder=tmp_path, config={})
        for step in range(1000):
            tracker.log({"step": step, "split": "train", "loss": 1.0})
        assert time.monotonic() - start < 0.5
        tracker.close(0)
        assert time.monotonic() - start < 3
        assert message in caplog.text
        assert "metrics.jsonl is complete" in caplog.text
