"""Balanced partition of layers into stages: minimizes the cost of the slowest stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from trainer.errors import ConfigError, Problem


def balance(costs: Sequence[float], stages: int, speeds: Sequence[float] | None = None) -> list[int]:
    """Minimize the cost of the slowest stage; of equal partitions, return the most even one.

    An exact search by dynamic programming over prefixes, in stages x layers^2 steps. DeepSpeed's `partition_balanced`
    minimizes the difference between stages instead, and does not support speeds.

    Args:
        costs: cost of each layer, in any unit.
        stages: number of stages.
        speeds: relative speed of each stage; all 1 by default.

    Returns:
        Bounds: stage s has the layers from bounds[s] up to bounds[s + 1], at least one.
    """
    speeds = speeds or [1.0] * stages
    prefix = [0.0, *accumulate(costs)]
    count = len(costs)
    none: tuple[float, float, tuple[int, ...]] = (math.inf, math.inf, ())
    best = [(0.0, 0.0, (0,)), *[none] * count]
    for stage in range(stages):
        extended = [none] * (count + 1)
        for end in range(stage + 1, count - (stages - stage - 1) + 1):
            extended[end] = min(
                (max(slowest, cost), squares + cost * cost, (*bounds, end))
                for start in range(stage, end)
                for slowest, squares, bounds in [best[start]]
                for cost in [(prefix[end] - prefix[start]) / speeds[stage]]
            )
        best = extended
    return list(best[count][2])


def stage_bounds(
    costs: Sequence[float], stages: int, layers: Sequence[int] | None = None, speeds: Sequence[float] | None = None
) -> list[int]:
    """Return the bounds of the stages as configured.

    Args:
        costs: cost of each layer.
        stages: number of stages.
        layers: `parallel.pipeline_layers`, the number of layers of each stage; balanced by default.
        speeds: `parallel.pipeline_weights`.

    Raises:
        ConfigError: for more stages than layers, or layers that do not add up.
    """
    if stages > len(costs):
        reason = f"must be at most the {len(costs)} layers of the model (got {stages})"
        raise ConfigError(Problem("parallel.pipeline", reason, "Lower it"))
    if layers is None:
        return balance(costs, stages, speeds)
    if sum(layers) != len(costs):
        reason = f"must add up to the {len(costs)} layers of the model (got {list(layers)}, {sum(layers)} layers)"
        raise ConfigError(Problem("parallel.pipeline_layers", reason, "Remove it to balance layers by their cost"))
    return [0, *accumulate(layers)]
