"""`events.jsonl`: the events of a run, one object a line, appended by rank 0 and synced at once.

Unlike `metrics.jsonl` it is used for decisions: a run directory with a `save` event but no checkpoint has lost its
checkpoints.
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


def append_event(run: Path, event: Event, *, attempt: int, step: int, **details: object) -> None:
    """Append one event to the run directory `run`; log a warning if it cannot be written. Call it on one rank.

    Args:
        run: The run directory.
        event: What happened.
        attempt: Number of the attempt, from 1.
        step: Optimizer steps completed.
        details: Further keys of the event, plain JSON.
    """
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    row = {"time": time, "attempt": attempt, "step": step, "event": event, **details}
    try:
        with open(run / EVENTS, "a+b", buffering=0, opener=open_without_following_links) as file:
            _append(file, json.dumps(redact_json(row), allow_nan=False).encode() + b"\n")
    except OSError as error:
        log.warning("%s: event '%s' not written: %s", run / EVENTS, event, error)


def _append(file: FileIO, line: bytes) -> None:
    """Append and sync a line. A line that does not fit on the disk leaves the file unchanged."""
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
    """Return True if the last line is incomplete, because the process that wrote it was killed."""
    if end == 0:
        return False
    file.seek(end - 1)
    return file.read(1) != b"\n"


def read_events(run: Path) -> list[dict[str, Any]]:
    """Read the events of a run directory, oldest first; skip damaged lines. Empty if there is no readable file."""
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
