"""Which layers each stage gets: so that the slowest stage is as fast as it can be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from trainer.errors import ConfigError, Problem


def balance(costs: Sequence[float], stages: int, speeds: Sequence[float] | None = None) -> list[int]:
    """Divides layers, in their order, over stages with the least cost of the slowest one; of equals, the most even.

    An exact search (dynamic programming over prefixes, stages x layers^2 steps).

    Args:
        costs: of each layer, in any unit.
        speeds: of each stage, relative to each other; all 1 by default.

    Returns:
        Bounds: stage s has the layers from bounds[s] up to bounds[s + 1], at least one.
    """
    speeds = speeds or [1.0] * stages
    before = [0.0, *accumulate(costs)]
    count = len(costs)
    none: tuple[float, float, tuple[int, ...]] = (math.inf, math.inf, ())
    best = [(0.0, 0.0, (0,)), *[none] * count]
    for stage in range(stages):
        found = [none] * (count + 1)
        for end in range(stage + 1, count - (stages - stage - 1) + 1):
            found[end] = min(
                (max(slowest, own), squares + own * own, (*bounds, end))
                for start in range(stage, end)
                for slowest, squares, bounds in [best[start]]
                for own in [(before[end] - before[start]) / speeds[stage]]
            )
        best = found
    return list(best[count][2])


def stage_bounds(
    costs: Sequence[float], stages: int, layers: Sequence[int] | None = None, speeds: Sequence[float] | None = None
) -> list[int]:
    """Bounds of the stages, as the configuration wants them.

    Args:
        layers: `parallel.pipeline_layers`. speeds: `parallel.pipeline_weights`.

    Raises:
        ConfigError: for more stages than layers, or layers that do not add up.
    """
    if stages > len(costs):
        raise ConfigError(
            Problem("parallel.pipeline", f"{stages} stages, and the model has {len(costs)} layers", "Lower it")
        )  # fmt: skip
    if layers is None:
        return balance(costs, stages, speeds)
    if sum(layers) != len(costs):
        raise ConfigError(
            Problem("parallel.pipeline_layers", f"{list(layers)} are {sum(layers)} layers, and the model has "
                    f"{len(costs)}", "Leave it out, and layers are divided by their cost")
        )  # fmt: skip
    return [0, *accumulate(layers)]
