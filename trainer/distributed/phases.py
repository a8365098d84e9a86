"""What a rank is doing, and how long a collective may take in it."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import Literal, NamedTuple

import torch.distributed as dist

from trainer.compat.torch.process_groups import set_timeout_of_all_groups

Phase = Literal["start", "data", "join", "build", "resume", "step", "evaluate", "save", "final", "finished"]

LIMITED: tuple[Phase, ...] = ("step", "evaluate", "save", "final")
"""Phases in which `run.collective_timeout_seconds` holds; before the first step ranks have `JOIN_TIMEOUT`."""

JOIN_TIMEOUT = timedelta(hours=24)
"""How long ranks wait for each other before training; another host may have a corpus to tokenize first."""

COMPILE_SECONDS = 600.0
"""The least limit of the first step and of the first evaluation, in which kernels are compiled and loaded."""

DEFAULT_SECONDS = 1800.0

_NAMES: dict[Phase, str] = {
    "start": "starting", "data": "preparing data", "join": "joining", "build": "building the model",
    "resume": "resuming", "step": "step {}", "evaluate": "evaluation at step {}", "save": "checkpoint of step {}",
    "final": "writing the final model", "finished": "finished",
}  # fmt: skip


class PhaseMark(NamedTuple):
    """Where a rank is. All ranks enter the same phases in the same order, so positions can be compared."""

    phase_index: int = 0
    """Number of phases entered so far."""

    progress: int = 0
    """Units of work done since the phase was entered: micro-batches, files, tensors."""

    phase: Phase = "start"
    step: int = 0

    @property
    def name(self) -> str:
        return _NAMES[self.phase].format(self.step)


class Phases:
    """The current phase of this rank. The main thread writes plain attributes and takes no lock; other threads read."""

    def __init__(self, timeout_seconds: float = DEFAULT_SECONDS) -> None:
        """Args:
        timeout_seconds: `run.collective_timeout_seconds`.
        """
        self.mark = PhaseMark()
        self.timeout = JOIN_TIMEOUT.total_seconds()
        """Limit of a collective in the current phase, in seconds."""

        self._configured = timeout_seconds
        self._entries: Counter[Phase] = Counter()

    def enter(self, phase: Phase, step: int = 0) -> None:
        """Enter a phase; all ranks must enter the same ones in the same order. Main thread only.

        Sets the timeout of every process group where it changes, and after the first two entries of a phase, because
        DeepSpeed creates some of its groups on first use.
        """
        self._entries[phase] += 1
        timeout = self._timeout_of(phase)
        if timeout != self.timeout or self._entries[phase] <= 2:
            if dist.is_initialized():
                set_timeout_of_all_groups(timedelta(seconds=timeout))
            self.timeout = timeout
        self.mark = PhaseMark(self.mark.phase_index + 1, 0, phase, step)

    def advance(self) -> None:
        """Note progress within the phase: the limit counts from here. Main thread only."""
        phase_index, progress, phase, step = self.mark
        self.mark = PhaseMark(phase_index, progress + 1, phase, step)

    def _timeout_of(self, phase: Phase) -> float:
        if phase not in LIMITED:
            return JOIN_TIMEOUT.total_seconds()
        if phase in ("step", "evaluate") and self._entries[phase] == 1:
            return max(self._configured, COMPILE_SECONDS)
        return self._configured
