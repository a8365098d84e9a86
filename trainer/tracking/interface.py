"""What is logged, and what a tracker is."""

from __future__ import annotations

from typing import Any, Protocol

Row = dict[str, Any]
"""One line of `metrics.jsonl`: plain JSON, with the keys of DESIGN 2.3."""


class Tracker(Protocol):
    """Receives every logged row, on one rank only. Must never hold up training for long, nor fail it."""

    def log(self, row: Row) -> None: ...

    def close(self, exit_status: int) -> None:
        """The run is over; 0 means finished."""


class Trackers:
    """Several trackers as one; on ranks that do not track, none."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def log(self, row: Row) -> None:
        for tracker in self._trackers:
            tracker.log(row)

    def close(self, exit_status: int) -> None:
        for tracker in self._trackers:
            tracker.close(exit_status)
