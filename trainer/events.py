"""`events.jsonl`: what happened to a run, one object an event, appended by one rank and synced at once.

Unlike `metrics.jsonl` it is a record to decide by: a run directory that has a `save` event but no checkpoint has lost
its checkpoints.
"""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any, Literal, get_args

from trainer.files import open_without_following_links
from trainer.sanitize import redact_json

log = logging.getLogger(__name__)

EVENTS = "events.jsonl"
"""Name of the file in a run directory."""

Event = Literal["start", "resume", "save", "preempted", "failure", "finish"]


def append_event(run: Path, event: Event, *, attempt: int, step: int, **details: Any) -> None:
    """Append one event to the run directory `run`; call on one rank. An event that cannot be written is warned about.

    Args:
        attempt: number of this start of the run, from 1. step: optimizer steps completed. details: plain JSON.
    """
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    row = {"time": time, "attempt": attempt, "step": step, "event": event, **details}
    try:
        with open(run / EVENTS, "a+b", buffering=0, opener=open_without_following_links) as file:
            _append(file, json.dumps(redact_json(row), allow_nan=False).encode() + b"\n")
    except OSError as error:
        log.warning("%s: event '%s' not written: %s", run / EVENTS, event, error)


def _append(file: FileIO, line: bytes) -> None:
    """Append and sync a line. One that does not fit on the disk leaves the file as it was."""
    end = file.seek(0, os.SEEK_END)
    rest = b"\n" + line if _has_torn_line(file, end) else line
    try:
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    except OSError:
        file.truncate(end)
        raise


def _has_torn_line(file: FileIO, end: int) -> bool:
    """Whether the last line has no end, because the process that wrote it was killed."""
    if end == 0:
        return False
    file.seek(end - 1)
    return file.read(1) != b"\n"


def read_events(run: Path) -> list[dict[str, Any]]:
    """The events of a run directory, oldest first; empty where there are none. Damaged lines are left out."""
    try:
        lines = (run / EVENTS).read_bytes().splitlines()
    except OSError:
        return []
    events = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and row.get("event") in get_args(Event):
            events.append(row)
    return events
