"""Progress of long work on data, as log lines."""

from __future__ import annotations

import logging
import time

from trainer.units import format_bytes, format_duration

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Logs every few seconds how far long work has come, with its rate and the time left."""

    def __init__(self, what: str, total: int | None) -> None:
        """Args:
        what: verb and object, such as "tokenizing corpus.jsonl". total: bytes in all; None if that is unknown.
        """
        self._what, self._total = what, total
        self._start = self._last = time.monotonic()
        self._done = 0

    def add(self, size: int) -> None:
        """Count `size` bytes as done."""
        self._done += size
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        rate = self._done / (now - self._start)
        if self._total:
            left = format_duration(max(0, self._total - self._done) / max(rate, 1))
            log.info("%s: %d %% of %s, %.1f MB/s, %s left", self._what, 100 * self._done // self._total,
                     format_bytes(self._total), rate / 1e6, left)  # fmt: skip
        else:
            log.info("%s: %s, %.1f MB/s", self._what, format_bytes(self._done), rate / 1e6)
