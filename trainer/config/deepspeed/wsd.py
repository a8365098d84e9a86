"""The schedule `WSD`: warm-up, stable, decay. DeepSpeed has none.

MiniCPM (Hu et al. 2024, arXiv 2404.06395): the rate rises, stays, and falls over the last steps only, so the same run
serves many lengths: a checkpoint from the stable phase can be decayed on another mixture, or trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

DecayType = Literal["linear", "cosine", "1-sqrt"]

DECAYS: Mapping[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "1-sqrt": lambda progress: 1 - math.sqrt(progress),
}
"""From the share of the decay that is over to the share of the way down that is left."""


class WSD:
    """Sets the rate of step n, counted from 1, in every parameter group.

    With W = `warmup_num_steps`, D = `decay_num_steps`, T = `total_num_steps`:

        n <= W          warmup_min_lr + (warmup_max_lr - warmup_min_lr) * n / W
        W < n <= T - D  warmup_max_lr
        n > T - D       decay_min_lr + (warmup_max_lr - decay_min_lr) * f((n - (T - D)) / D)
        n > T           decay_min_lr

    where f(x) is 1 - x, (1 + cos(pi x)) / 2, or 1 - sqrt(x). So step W is the first at the highest rate, and step T the
    first at the lowest.
    """

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        decay_num_steps: int,
        warmup_num_steps: int = 0,
        warmup_min_lr: float = 0.0,
        warmup_max_lr: float | None = None,
        decay_min_lr: float = 0.0,
        decay_type: DecayType = "linear",
    ) -> None:
        """Args:
        optimizer: torch's, or DeepSpeed's around it.
        warmup_max_lr: of every group; default: each group's own `lr`.
        """
        self._optimizer = optimizer
        self._total, self._decay, self._warmup = total_num_steps, decay_num_steps, warmup_num_steps
        self._first, self._last = warmup_min_lr, decay_min_lr
        self._peaks = [float(group["lr"]) if warmup_max_lr is None else warmup_max_lr for group in self._groups]
        self._fall = DECAYS[decay_type]
        self._steps = 0
        """Steps that have been taken."""

        self._set()

    @property
    def _groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        return groups

    def rate(self, step: int, peak: float) -> float:
        """The rate of a step, counted from 1."""
        if step <= self._warmup:
            return self._first + (peak - self._first) * step / self._warmup
        decayed = step - (self._total - self._decay)
        if decayed <= 0:
            return peak
        if decayed >= self._decay:
            return self._last
        return self._last + (peak - self._last) * self._fall(decayed / self._decay)

    def step(self) -> None:
        """After an optimizer step: sets the rates of the next one."""
        self._steps += 1
        self._set()

    def _set(self) -> None:
        for group, peak in zip(self._groups, self._peaks, strict=True):
            group["lr"] = self.rate(self._steps + 1, peak)

    def get_last_lr(self) -> list[float]:
        """The rates of the next step, by group."""
        return [group["lr"] for group in self._groups]
