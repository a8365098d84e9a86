"""Rows of metrics, and the trackers that receive them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, TypeVar

from trainer.config import LoadedConfig
from trainer.errors import TesseraError, first_line
from trainer.run_directory import RunDirectory

log = logging.getLogger(__name__)

T = TypeVar("T")

Row = dict[str, Any]
"""One row of metrics: plain JSON, with the keys of `metrics.jsonl`."""

States = Mapping[str, Mapping[str, str]]
"""State of each tracker by its name, as `Manifest.trackers` holds it."""


class Tracker(Protocol):
    """Receives every logged row, on rank 0 only. No method may block training for long."""

    def log(self, row: Row) -> None:
        """Record one row."""

    def state(self) -> Mapping[str, str]:
        """Return the state that the tracker needs in a resumed run; every checkpoint saves it."""

    def close(self, exit_status: int) -> None:
        """Finish at the end of the run; status 0 means that the run has finished."""


@dataclass(frozen=True)
class TrackerContext:
    """Arguments for the creation of a tracker."""

    loaded: LoadedConfig
    directory: RunDirectory
    state: Mapping[str, str]
    """The tracker's state at the checkpoint that the run resumes from; empty if there is none."""


TrackerFactory = Callable[[TrackerContext], Tracker | None]
"""Creates a tracker; returns None if the configuration disables it."""


class Trackers:
    """All trackers of a run; none on ranks other than 0. Leaving the `with` block closes them.

    A tracker that raises is disabled after one warning: no tracker ever ends a run.
    """

    def __init__(self, trackers: Mapping[str, Tracker], states: States | None = None) -> None:
        """Take over open trackers.

        Args:
            trackers: By name.
            states: State of each tracker at the checkpoint that the run resumes from. The state of a tracker that is
                disabled is kept, so that a later attempt can continue with it.
        """
        self._trackers = dict(trackers)
        self._states = dict(states or {})

    def log(self, row: Row) -> None:
        """Pass a row to every tracker."""
        for name in tuple(self._trackers):
            self._guarded(name, lambda tracker: tracker.log(row))

    def states(self) -> States:
        """Return the current state of each tracker."""
        for name in tuple(self._trackers):
            # As strings: a manifest with any other value could not be read again.
            state = self._guarded(name, lambda tracker: {key: str(value) for key, value in tracker.state().items()})
            if state:
                self._states[name] = state
        return dict(self._states)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, exception_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        exit_status = 0 if error is None else error.exit_status if isinstance(error, TesseraError) else 1
        for name in tuple(self._trackers):
            self._guarded(name, lambda tracker: tracker.close(exit_status))

    def _guarded(self, name: str, call: Callable[[Tracker], T]) -> T | None:
        tracker = self._trackers[name]
        try:
            return call(tracker)
        except Exception as error:
            log.warning("tracker '%s' disabled after an error: %s. Training continues", name, first_line(error))
            del self._trackers[name]
            with suppress(Exception):
                tracker.close(1)
            return None
