"""Time that a step of 20 ms waits for its data, and the cost of starting at any position."""

from __future__ import annotations

import argparse
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from tools.bench.common import configuration, table, write_tokens
from trainer.data import open_batches, prepare_data
from trainer.topology import Topology

QUICK: dict[str, Any] = {"steps": 5}

_STARTS = (0, 10**3, 10**6, 10**9)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=200, help="steps of 20 ms (default 200)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        write_tokens(Path(name))
        loaded = configuration(Path(name), 5, batch=32)
        batches = open_batches(loaded, prepare_data(loaded), Topology.of(1, 0)).train
        waited = _waiting(batches, options.steps)
        starts = {start: _cost(batches, start) for start in _STARTS}
    share = waited / (options.steps * 0.020)
    print(f"waiting for data: {100 * share:.3f} % of {options.steps} steps of 20 ms, 32 samples of 256 tokens each\n")
    print(table(("first step", "ms a batch"), [(f"{s:,}", f"{1e3 * c:.3f}") for s, c in starts.items()]))
    return {"waiting_share": share, "seconds_by_start": starts}


def _waiting(batches: Any, steps: int) -> float:
    waited = 0.0
    iterator = batches.steps(1, steps + 1)
    next(iterator)  # the start of the reader does not belong to a step
    for _ in range(steps):
        time.sleep(0.020)
        begin = time.perf_counter()
        next(iterator)
        waited += time.perf_counter() - begin
    iterator.close()
    return waited


def _cost(batches: Any, start: int, rounds: int = 30) -> float:
    times = [time.process_time()]
    for step in range(start + 1, start + 1 + rounds):
        batches.batch_at(step)
        times.append(time.process_time())
    return min(after - before for before, after in pairwise(times))
