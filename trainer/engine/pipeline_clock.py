"""Measures how much of a pipeline schedule's time a rank spends computing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias

import torch

from trainer.compat.deepspeed.pipeline import Instruction

_Instant: TypeAlias = "float | torch.cuda.Event"


class PipelineClock:
    """Sums the time between the start and the end of each forward and backward pass of a training schedule.

    On a GPU timestamps are events in the stream, so that measuring does not wait for the device.
    """

    def __init__(self, device: torch.device, advance: Callable[[], None]) -> None:
        """Start without a schedule.

        Args:
            device: device that computes.
            advance: called before each pass of a micro-batch.
        """
        self._is_on_gpu, self._advance = device.type == "cuda", advance
        self._passes: list[tuple[_Instant, _Instant]] = []
        self._start: _Instant | None = None
        self._end: _Instant | None = None

    def begin(self) -> None:
        """Mark the start of a training schedule."""
        self._passes, self._start, self._end = [], self._now(), None

    def end(self) -> None:
        """Mark the end of the passes, which the reduction of gradients follows."""
        self._end = self._now()

    def timed(self, execute: Instruction) -> Instruction:
        """Wrap an instruction, whose time counts as work; in evaluation it only advances."""

        def execute_timed(engine: object, **arguments: int) -> None:
            self._advance()
            start = self._now()
            execute(engine, **arguments)
            if self._start is not None and self._end is None:
                self._passes.append((start, self._now()))

        return execute_timed

    def idle_share(self) -> float:
        """Compute the share of the last schedule, up to the reduction of gradients, in which this rank was idle.

        On a GPU it waits for the end of the step.
        """
        if self._is_on_gpu:
            torch.cuda.synchronize()
        assert self._start is not None
        assert self._end is not None
        return 1 - sum(_seconds(start, end) for start, end in self._passes) / _seconds(self._start, self._end)

    def _now(self) -> _Instant:
        if not self._is_on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _seconds(start: _Instant, end: _Instant) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert isinstance(start, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    return float(start.elapsed_time(end)) / 1000
