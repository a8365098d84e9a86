"""CPU time of a step that compares the weights of all ranks by hash, against one that does not."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tools.bench.common import configuration, table, write_tokens
from tools.ranks import run_ranks, time_limit
from trainer.assembly import assemble
from trainer.distributed import Launch, World, joined_world
from trainer.topology import Topology

QUICK: dict[str, Any] = {"steps": 2, "size": 1}

_WARM_UP = 2
_CASES: dict[str, dict[str, Any]] = {
    "fp32, ZeRO 0": {"zero_optimization": {"stage": 0}},
    "fp32, ZeRO 1": {"zero_optimization": {"stage": 1}},
    "bf16, ZeRO 1": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each type (default 8)")
    parser.add_argument("--size", type=int, default=25, help="millions of parameters: 1, 5 or 25 (default)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, time_limit(3600):
        write_tokens(Path(folder))
        figures = run_ranks(_seconds, 2, folder, options.size, options.steps)[0]
    rows = [
        (name, f"{case['without']:.3f}", f"{case['with']:.3f}", f"{100 * (case['with'] / case['without'] - 1):+.1f} %")
        for name, case in figures.items()
    ]
    print(f"{options.size} M parameters, 2 ranks, 8 samples of 256 tokens each: CPU seconds of a step, medians\n")
    print(table(("case", "without", "with verification", "cost"), rows))
    return figures


def _seconds(folder: str, millions: int, steps: int) -> dict[str, dict[str, float]]:
    """On each rank: by case, the seconds of a step with and without a verification."""
    launch = Launch.from_environment()
    with joined_world(launch, Topology.of(launch.world_size, launch.rank), seed=1) as world:
        return {name: _case(folder, millions, steps, settings, world) for name, settings in _CASES.items()}


def _case(folder: str, millions: int, steps: int, settings: dict[str, Any], world: World) -> dict[str, float]:
    trainer = assemble(configuration(Path(folder), millions, world=world.topology.world_size, **settings), world)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for step, batch in enumerate(trainer.batches.train.steps(1, 2 * steps + _WARM_UP), start=1):
        verifies = step % 2 == 0
        begin = time.process_time()
        trainer.engine.train_step(batch, verify_step=step if verifies else None)
        if step > _WARM_UP:
            seconds[verifies].append(time.process_time() - begin)
    return {"without": statistics.median(seconds[False]), "with": statistics.median(seconds[True])}
