"""What is logged, and what a tracker is."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol

from trainer.errors import TesseraError

Row = dict[str, Any]
"""One line of `metrics.jsonl`: plain JSON, with the keys of DESIGN 2.3."""


class Tracker(Protocol):
    """Receives every logged row, on one rank only. Must never hold up training for long, nor fail it."""

    def log(self, row: Row) -> None: ...

    def close(self, exit_status: int) -> None:
        """The run is over; 0 means finished."""


class Trackers:
    """Several trackers as one; on ranks that do not track, none. Leaving the `with` block closes them."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def log(self, row: Row) -> None:
        for tracker in self._trackers:
            tracker.log(row)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        exit_status = 0 if error is None else error.exit_status if isinstance(error, TesseraError) else 1
        for tracker in self._trackers:
            tracker.close(exit_status)
