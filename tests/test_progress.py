"""Log lines about the progress of long operations on data."""

from __future__ import annotations

import logging

import pytest

from trainer.data import progress
from trainer.data.progress import Progress

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("total", "message"),
    [(40_000_000, "reading x: 50 % of 40.00 MB, 2.0 MB/s, 0:00:10 left"), (None, "reading x: 20.00 MB, 2.0 MB/s")],
)
def test_progress_logs_rate_and_remaining_time(
    total: int | None, message: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After 10 s, and not before 5 s have passed since the last line."""
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with caplog.at_level(logging.INFO):
        tracked = Progress("reading x", total)
        now = 1004.0
        tracked.add(15_000_000)
        assert caplog.messages == []
        now = 1010.0
        tracked.add(5_000_000)
        tracked.add(1)
    assert caplog.messages == [message]
