"""Log the progress of long operations on data."""

from __future__ import annotations

import logging
import time

from trainer.units import format_bytes, format_duration

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Log every few seconds the fraction done, the rate and the remaining time."""

    def __init__(self, what: str, total: int | None) -> None:
        """Start the clock.

        Args:
            what: verb and object, such as "tokenizing corpus.jsonl".
            total: total bytes; None if unknown.
        """
        self._what, self._total = what, total
        self._start = self._last = time.monotonic()
        self._done = 0

    def add(self, size: int) -> None:
        """Count `size` more bytes as done."""
        self._done += size
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        rate = self._done / (now - self._start)
        if self._total:
            remaining = format_duration(max(0, self._total - self._done) / max(rate, 1))
            percent, total = 100 * self._done // self._total, format_bytes(self._total)
            log.info("%s: %d %% of %s, %.1f MB/s, %s left", self._what, percent, total, rate / 1e6, remaining)
        else:
            log.info("%s: %s, %.1f MB/s", self._what, format_bytes(self._done), rate / 1e6)
