"""`events.jsonl`: appending events, and reading a damaged file."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.events import EVENTS, append_event, read_events

pytestmark = pytest.mark.fast


def test_events_are_read_as_they_were_appended(tmp_path: Path) -> None:
    append_event(tmp_path, "start", attempt=1, step=0, processes=2)
    append_event(tmp_path, "save", attempt=1, step=4, checkpoint="step-00000004")
    first, second = read_events(tmp_path)
    assert list(first) == ["time", "attempt", "step", "event", "processes"]
    assert second["time"].endswith("+00:00")
    assert (second["event"], second["step"], second["checkpoint"]) == ("save", 4, "step-00000004")


def test_event_after_torn_line_is_read(tmp_path: Path) -> None:
    append_event(tmp_path, "start", attempt=1, step=0)
    path = tmp_path / EVENTS
    path.write_bytes(path.read_bytes() + b'{"time": "2026-')
    append_event(tmp_path, "save", attempt=2, step=3)
    assert [event["event"] for event in read_events(tmp_path)] == ["start", "save"]


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"[" * 1_000_000, b"null\n3\n[]", b'{"event": ["save"]}', b'{"event": 3}']
)
def test_damaged_lines_are_skipped(tmp_path: Path, content: bytes) -> None:
    (tmp_path / EVENTS).write_bytes(content + b"\n")
    append_event(tmp_path, "save", attempt=1, step=1)
    assert [event["event"] for event in read_events(tmp_path)] == ["save"]


def test_missing_or_unreadable_file_has_no_events(tmp_path: Path) -> None:
    assert read_events(tmp_path) == []
    (tmp_path / EVENTS).mkdir()
    assert read_events(tmp_path) == []
    append_event(tmp_path, "save", attempt=1, step=1)  # warns
