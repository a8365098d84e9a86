"""`events.jsonl`: what happened to a run, one object an event, appended by one rank and synced at once.

Unlike `metrics.jsonl` it is a record to decide by: a run directory that has a `save` event but no checkpoint has lost
its checkpoints.
"""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

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
        with (run / EVENTS).open("a+b") as file:
            if _ends_torn(file):
                file.write(b"\n")
            file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        log.warning("%s: event '%s' not written: %s", run / EVENTS, event, error)


def _ends_torn(file: BinaryIO) -> bool:
    """Whether the last line has no end, because the process that wrote it was killed."""
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
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
