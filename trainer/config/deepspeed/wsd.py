"""The learning-rate schedule WSD: warm-up, stable, decay. DeepSpeed has none.

MiniCPM (Hu et al. 2024, arXiv 2404.06395): the rate rises, stays constant, and falls over the last steps only. A
checkpoint of the stable phase can therefore be decayed on another mixture, or trained further.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

DecayType = Literal["linear", "cosine", "1-sqrt"]

DECAYS: Mapping[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "1-sqrt": lambda progress: 1 - math.sqrt(progress),
}
"""Remaining share of the decrease, as a function of the progress of the decay in [0, 1]."""


class HasParameterGroups(Protocol):
    """The interface of an optimizer that a schedule uses."""

    param_groups: list[dict[str, Any]]


class WSD:
    """Set the rate of step n, counted from 1, in every parameter group.

    With W = `warmup_num_steps`, D = `decay_num_steps`, T = `total_num_steps`:

        n <= W          warmup_min_lr + (warmup_max_lr - warmup_min_lr) * n / W
        W < n <= T - D  warmup_max_lr
        n > T - D       decay_min_lr + (warmup_max_lr - decay_min_lr) * f((n - (T - D)) / D)
        n > T           decay_min_lr

    where f(x) is 1 - x, (1 + cos(pi x)) / 2, or 1 - sqrt(x). Step W is the first at the highest rate, and step T the
    first at the lowest.
    """

    def __init__(
        self,
        optimizer: HasParameterGroups,
        *,
        total_num_steps: int,
        decay_num_steps: int,
        warmup_num_steps: int = 0,
        warmup_min_lr: float = 0.0,
        warmup_max_lr: float | None = None,
        decay_min_lr: float = 0.0,
        decay_type: DecayType = "linear",
    ) -> None:
        """Set the rate of the first step.

        Args:
            optimizer: PyTorch's, or DeepSpeed's wrapper of it.
            total_num_steps: Steps of the schedule.
            decay_num_steps: Steps of the decay, the last ones.
            warmup_num_steps: Steps of the warm-up, the first ones.
            warmup_min_lr: Rate that the warm-up starts from.
            warmup_max_lr: Rate of the stable phase. Default: the `lr` of each parameter group.
            decay_min_lr: Rate that the decay ends at.
            decay_type: Shape of the decay.
        """
        self._optimizer = optimizer
        self._total, self._decay, self._warmup = total_num_steps, decay_num_steps, warmup_num_steps
        self._first, self._last = warmup_min_lr, decay_min_lr
        self._peaks = [float(group["lr"]) if warmup_max_lr is None else warmup_max_lr for group in self._groups]
        self._fall = DECAYS[decay_type]
        self._steps = 0
        """Completed optimizer steps."""

        self._set()

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def rate(self, step: int, peak: float) -> float:
        """Return the rate of a step, counted from 1, in a group with the given peak rate."""
        if step <= self._warmup:
            return self._first + (peak - self._first) * step / self._warmup
        decayed = step - (self._total - self._decay)
        if decayed <= 0:
            return peak
        if decayed >= self._decay:
            return self._last
        return self._last + (peak - self._last) * self._fall(decayed / self._decay)

    def step(self) -> None:
        """Set the rates of the next step. Call after each optimizer step."""
        self._steps += 1
        self._set()

    def _set(self) -> None:
        for group, peak in zip(self._groups, self._peaks, strict=True):
            group["lr"] = self.rate(self._steps + 1, peak)

    def get_last_lr(self) -> list[float]:
        """Return the rates of the next step, by group."""
        return [group["lr"] for group in self._groups]
