"""Phases of a run, and the timeout of collectives in each."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import Literal, NamedTuple

import torch.distributed as dist

from trainer.compat.torch.process_groups import set_timeout_of_all_groups

Phase = Literal["start", "data", "join", "build", "resume", "step", "evaluate", "save", "final", "finished"]

LIMITED: tuple[Phase, ...] = ("step", "evaluate", "save", "final")
"""Phases in which `run.collective_timeout_seconds` applies; before the first step it is `JOIN_TIMEOUT`."""

JOIN_TIMEOUT = timedelta(hours=24)
"""Timeout of ranks for each other before training: another host may have a corpus to tokenize first."""

COMPILE_SECONDS = 600.0
"""Minimum timeout of the first step and of the first evaluation, in which kernels are compiled and loaded."""

DEFAULT_SECONDS = 1800.0

_NAMES: dict[Phase, str] = {
    "start": "starting",
    "data": "preparing data",
    "join": "joining",
    "build": "building the model",
    "resume": "resuming",
    "step": "step {}",
    "evaluate": "evaluation at step {}",
    "save": "checkpoint of step {}",
    "final": "writing the final model",
    "finished": "finished",
}


class PhaseMark(NamedTuple):
    """Progress of a rank. All ranks enter the same phases in the same order, so that marks can be compared."""

    phase_index: int = 0
    """Number of phases entered so far."""

    progress: int = 0
    """Units of work completed in the phase: micro-batches, files, tensors."""

    phase: Phase = "start"
    step: int = 0

    @property
    def name(self) -> str:
        """Phase and step, for messages."""
        return _NAMES[self.phase].format(self.step)


class Phases:
    """Current phase of this rank. The main thread writes plain attributes without a lock; other threads read them."""

    def __init__(self, timeout_seconds: float = DEFAULT_SECONDS) -> None:
        """Start in the phase "start".

        Args:
            timeout_seconds: `run.collective_timeout_seconds`.
        """
        self.mark = PhaseMark()
        self.timeout = JOIN_TIMEOUT.total_seconds()
        """Timeout of a collective in the current phase, in seconds."""

        self._configured = timeout_seconds
        self._entries: Counter[Phase] = Counter()

    def enter(self, phase: Phase, step: int = 0) -> None:
        """Enter a phase. All ranks must enter the same phases in the same order. Main thread only.

        Sets the timeout of all process groups if it changes, and in the first two entries of a phase, because DeepSpeed
        creates some of its groups on first use.
        """
        self._entries[phase] += 1
        timeout = self._timeout_of(phase)
        if timeout != self.timeout or self._entries[phase] <= 2:
            if dist.is_initialized():
                set_timeout_of_all_groups(timedelta(seconds=timeout))
            self.timeout = timeout
        self.mark = PhaseMark(self.mark.phase_index + 1, 0, phase, step)

    def advance(self) -> None:
        """Count one unit of work in the phase, from which the timeout runs again. Main thread only."""
        phase_index, progress, phase, step = self.mark
        self.mark = PhaseMark(phase_index, progress + 1, phase, step)

    def _timeout_of(self, phase: Phase) -> float:
        if phase not in LIMITED:
            return JOIN_TIMEOUT.total_seconds()
        if phase in ("step", "evaluate") and self._entries[phase] == 1:
            return max(self._configured, COMPILE_SECONDS)
        return self._configured
