"""The console and `metrics.jsonl`."""

from __future__ import annotations

import io
import json
import logging
import math
import re
import sys
from pathlib import Path

import pytest

from tests.commands import TRAIN_KEYS
from trainer.tasks import TASKS
from trainer.tracking.console import Console, describe
from trainer.tracking.jsonl import JsonLines


@pytest.mark.fast
def test_jsonl_row_is_valid_json_and_flushed(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.log({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 1, "loss": None, "grad_norm": None}


@pytest.mark.fast
def test_perplexity_does_not_overflow() -> None:
    assert TASKS["causal_lm"].metrics(2.0, {})["perplexity"] == pytest.approx(math.exp(2))
    assert TASKS["causal_lm"].metrics(1e6, {})["perplexity"] == math.inf


@pytest.mark.fast
def test_console_line_shows_metrics_with_units() -> None:
    values = {
        "split": "train",
        "step": 3,
        "loss": 1.5,
        "grad_norm": 0.25,
        "learning_rate": 3e-4,
        "tokens_per_second": 12_345.0,
        "mfu": 0.41,
        "memory_bytes_max": 2e9,
        "step_seconds": 2.0,
        "data_wait_seconds": 0.02,
    }
    line = describe(dict.fromkeys(TRAIN_KEYS, 0.0) | values, 10)
    assert line == (
        "step 3/10  loss 1.5000  grad norm 0.250  lr 3.00e-04  12.3k tokens/s  MFU 41.0 %  memory 2.00 GB  "
        "data wait 1.0 %"
    )


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.fast
@pytest.mark.parametrize("terminal", [True, False])
def test_time_left_is_computed_from_step_time(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In hours, minutes and seconds, for a run that resumes at step 90,000 of 100,000 after more than a day."""
    screen = _Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(logging.getLogger("trainer"), "propagate", True)
    caplog.set_level(logging.INFO)
    console = Console(100_000)
    row = dict.fromkeys(TRAIN_KEYS, 0.0) | {"split": "train", "step": 90_010, "step_seconds": 9.5, "mfu": None}
    console.log(row)
    if console._progress is not None:
        (task,) = console._progress.tasks
        task.start_time = console._progress.get_time() - 100_000.4
        console._progress.refresh()
    console.close(0)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue()) if terminal else caplog.text
    assert "left 26:21:45" in shown
    if terminal:
        assert re.search(r"90010/100000 27:46:40 left 26:21:45", shown), shown
