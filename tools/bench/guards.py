"""Cost of fault tolerance, and the time until a run ends after a signal or the stop of a rank."""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tools.bench.common import configuration, settings, table, write_tokens
from tools.bench.launches import ROOT, launched, rank_processes, wait_for_steps
from tools.ranks import run_ranks, running_command, time_limit
from trainer.assembly import Trainer, assemble
from trainer.config import load_config
from trainer.data import source_facts
from trainer.distributed import Launch, configure_logging, joined_world, open_store
from trainer.fault_tolerance import StopAgreement, StopRequests, compare_ranks, start_facts
from trainer.fault_tolerance.run_lock import RunLock
from trainer.fault_tolerance.watchdog import Watchdog
from trainer.topology import Topology

QUICK: dict[str, Any] = {
    "size": 1,
    "pairs": 3,
    "steps": 5,
    "comparisons": 1,
    "limit": 4.0,
    "launches": 0,
    "stopped": ["data"],
}

_WARM_UP = 3
_LOCKS = 200
_LEFT_AFTER = 10.0
"""Seconds after a signal at which the remaining ranks are counted."""

_DEFAULT_LIMIT = 1800.0
_NOT_RUN = "not in a short round"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size",
        type=int,
        default=25,
        choices=(1, 5, 25),
        help="millions of parameters of the signalled runs (default 25)",
    )
    parser.add_argument(
        "--pairs", type=int, default=20, help="pairs of blocks of steps with and without guards (default 20)"
    )
    parser.add_argument("--steps", type=int, default=100, help="steps of a block (default 100)")
    parser.add_argument("--comparisons", type=int, default=5, help="starts at which ranks are compared (default 5)")
    parser.add_argument(
        "--limit", type=float, default=20.0, help="run.collective_timeout_seconds where a rank is stopped (default 20)"
    )
    parser.add_argument("--launches", type=int, default=2, help="starts of `deepspeed` for each signal (default 2)")
    parser.add_argument(
        "--stopped",
        nargs="+",
        default=["data", "pipeline", "default"],
        choices=("data", "pipeline", "default"),
        help="runs of which a rank is stopped: of data ranks, of pipeline stages, and of data ranks at "
        "the default limit, until the rank is named (default: all)",
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    # One after the other for figures; a short round only checks that everything works.
    workers = 1 if options.launches else 4
    with tempfile.TemporaryDirectory() as name, time_limit(3600), ThreadPoolExecutor(workers) as pool:
        folder = Path(name)
        write_tokens(folder)
        lock = _lock_seconds(folder / "locked")
        to_compare = [pool.submit(run_ranks, _comparison_seconds, 2, name) for _ in range(options.comparisons)]
        to_step = pool.submit(run_ranks, _steps, 2, name, options.pairs, options.steps)
        to_stop = {case: pool.submit(_stopped, folder, case, options.limit) for case in options.stopped}
        to_signal = {
            number.name: [
                pool.submit(_signalled, folder / f"{number.name}-{count}", folder, options.size, number)
                for count in range(options.launches)
            ]
            for number in (signal.SIGTERM, signal.SIGKILL)
        }
        compared, blocks = [max(work.result()) for work in to_compare], to_step.result()
        stopped = {case: work.result() for case, work in to_stop.items()}
        signalled = {name: [work.result() for work in launches] for name, launches in to_signal.items()}
    differences = [a - b for a, b in zip(blocks[0]["with"], blocks[0]["without"], strict=True)]
    figures = {
        "look_up_seconds": max(statistics.median(rank["look_up"]) for rank in blocks),
        "lock_seconds": lock,
        "comparison_seconds": compared,
        "step_seconds": {key: blocks[0][key] for key in ("with", "without")},
        "step_difference_seconds": statistics.median(differences),
        "step_difference_error": statistics.stdev(differences) / math.sqrt(len(differences)),
        "stopped": stopped,
        "signalled": signalled,
    }
    print(
        f"2 ranks; {options.pairs} interleaved pairs of {options.steps} steps (1 M parameters, 256 tokens a rank); "
        f"signals to runs of {options.size} M parameters\n"
    )
    print(table(("", ""), _rows(figures, options.limit)))
    return figures


def _rows(figures: dict[str, Any], limit: float) -> list[tuple[str, str]]:
    step = 1e3 * statistics.median(figures["step_seconds"]["without"])
    difference, error = (1e3 * figures[f"step_difference_{key}"] for key in ("seconds", "error"))
    rows = [
        ("stop look-up after a step, median", f"{1e6 * figures['look_up_seconds']:.0f} us"),
        ("taking and releasing the run lock, median", f"{1e3 * figures['lock_seconds']:.2f} ms"),
        ("comparing the ranks at the start, CPU, median", f"{statistics.median(figures['comparison_seconds']):.3f} s"),
        (f"guards, CPU time of a step of {step:.1f} ms", f"{difference:+.3f} ms, standard error {error:.3f} ms"),
    ]
    for name, ends in figures["signalled"].items():
        seconds = ", ".join(f"{end['seconds']:.1f}" for end in ends)
        left = max((end["left"] for end in ends), default=0)
        rows.append((f"{name} of deepspeed, until all ranks have ended", f"{seconds} s" if ends else _NOT_RUN))
        rows.append((f"{name}, ranks left after {_LEFT_AFTER:.0f} s, at most", str(left) if ends else _NOT_RUN))
    stopped = figures["stopped"]
    for case, what in (("data", f"limit {limit:g} s"), ("pipeline", f"limit {limit:g} s, 2 stages")):
        ended = f"{stopped[case]['beyond']:.1f} s" if case in stopped else _NOT_RUN
        named = f"{stopped[case]['named']:.1f} s" if case in stopped else _NOT_RUN
        rows.append((f"rank stopped, {what}: named after", named))
        rows.append((f"rank stopped, {what}: the other ends, beyond the limit", ended))
    named = f"{stopped['default']['named']:.1f} s" if "default" in stopped else _NOT_RUN
    return [*rows, (f"rank stopped, default limit, {_DEFAULT_LIMIT:.0f} s: named after", named)]


# Costs ----------------------------------------------------------------------------------------------------------------


def _lock_seconds(run_directory: Path) -> float:
    seconds = []
    for _ in range(_LOCKS):
        begin = time.perf_counter()
        RunLock.acquire(run_directory).release()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _comparison_seconds(folder: str) -> float:
    """CPU seconds of this rank, for the quickstart's configuration, as at the start of a run."""
    launch = Launch.from_environment()
    configure_logging(launch.rank)
    overrides = [f"run.output_dir={json.dumps(folder + '/compared')}"]
    loaded = load_config(ROOT / "ds_configs" / "quickstart.json", overrides, world_size=launch.world_size, device="cpu")
    store = open_store(launch)
    begin = time.process_time()
    compare_ranks(launch, store, "start", [*start_facts(loaded, launch), *source_facts(loaded)])
    return time.process_time() - begin


def _steps(folder: str, pairs: int, count: int) -> dict[str, list[float]]:
    """Measure the CPU seconds of a step with and without watchdog and stop agreement, and of each look-up.

    Collective: all ranks must call it. Torch's flight recorder, which cannot be switched on in a joined world, is in
    neither.
    """
    launch = Launch.from_environment()
    seconds: dict[str, list[float]] = {"with": [], "without": [], "look_up": []}
    with joined_world(launch, Topology.of(launch.world_size, launch.rank), seed=1) as world:
        loaded = configuration(Path(folder), 1, batch=1, world=launch.world_size, zero_optimization={"stage": 1})
        trainer = assemble(loaded, world)
        directory = trainer.directory
        batches = trainer.batches.train.steps(1, _WARM_UP + 2 * pairs * count)
        agreement = StopAgreement(StopRequests(launch.rank), world, directory, final_step=loaded.steps)
        for _ in range(_WARM_UP):
            trainer.engine.train_step(next(batches))
        for pair in range(pairs):
            for name in ("with", "without") if pair % 2 else ("without", "with"):
                watchdog = None
                if name == "with":
                    watchdog = Watchdog(launch, world.store, _DEFAULT_LIMIT, directory)
                    watchdog.phases = world.phases
                dist.barrier()
                begin = time.process_time()
                for step in range(1, count + 1):
                    if watchdog is None:
                        trainer.engine.train_step(next(batches))
                    else:
                        seconds["look_up"].append(_guarded_step(step, trainer, batches, agreement, watchdog))
                seconds[name].append((time.process_time() - begin) / count)
                if watchdog is not None:
                    watchdog.close()
    return seconds


def _guarded_step(step: int, trainer: Trainer, batches: Any, agreement: StopAgreement, watchdog: Watchdog) -> float:
    """Run a step as the training loop does. Return the seconds of the look-up after it."""
    batch = next(batches)
    agreement.before_step(step)
    watchdog.phases.enter("step", step)
    trainer.engine.train_step(batch)
    begin = time.perf_counter()
    agreement.stops_after(step)
    return time.perf_counter() - begin


# Ends -----------------------------------------------------------------------------------------------------------------


def _stopped(folder: Path, case: str, limit: float) -> dict[str, float]:
    """Seconds from SIGSTOP of rank 1 until rank 0's log names it, and beyond the limit until rank 0 has ended."""
    stages = 2 if case == "pipeline" else 1
    config = settings(folder, 1, batch=1, world=2 // stages, gradient_accumulation_steps=4)
    run_directory = folder / f"stopped-{case}"
    config["run"] = {"output_dir": str(run_directory)}
    if case != "default":
        config["run"]["collective_timeout_seconds"] = limit
    config["parallel"] = {"pipeline": stages}
    config["training"]["log_every_steps"] = 1
    path = folder / f"stopped-{case}.json"
    path.write_text(json.dumps(config))
    variables = {"DS_ACCELERATOR": "cpu"}
    with running_command(
        str(ROOT / "launch" / "train.py"), "--config", str(path), world=2, environment=variables
    ) as started:
        first, second = started.processes
        wait_for_steps(run_directory, 3, lambda: first.exitcode, lambda: started.output() + started.errors())
        os.kill(second.pid, signal.SIGSTOP)
        begin = time.monotonic()
        log = run_directory / "logs" / "rank-0.log"
        while "not arrived: rank 1" not in log.read_text():
            if time.monotonic() > begin + 60 + limit:
                raise RuntimeError(f"the log does not name the stopped rank:\n{log.read_text()[-2000:]}")
            time.sleep(0.02)
        named = time.monotonic() - begin
        if case == "default":
            return {"named": named}
        first.join(60 + limit)
        ended = time.monotonic() - begin
        if first.exitcode is None:
            raise RuntimeError(f"rank 0 still waits {ended:.0f} s after the other rank was stopped")
    return {"named": named, "beyond": ended - limit}


def _signalled(run_directory: Path, folder: Path, size: int, number: signal.Signals) -> dict[str, float]:
    """Measure the seconds from a signal to the `deepspeed` command until none of its ranks is left.

    Also return the number of remaining ranks after `_LEFT_AFTER`.
    """
    config = settings(folder, size, world=2)
    config["run"] = {"output_dir": str(run_directory)}
    config["training"]["log_every_steps"] = 1
    path = folder / f"{run_directory.name}.json"
    path.write_text(json.dumps(config))
    with launched(path) as command:
        output = path.with_suffix(".out")
        wait_for_steps(run_directory, 3, command.poll, output.read_text)
        time.sleep(random.uniform(0, 4))  # at a random moment of a step
        command.send_signal(number)
        begin, left = time.monotonic(), 0
        while ranks := rank_processes(path):
            seconds = time.monotonic() - begin
            if seconds >= _LEFT_AFTER:
                left = max(left, len(ranks))
            if seconds > 120:
                raise RuntimeError(f"ranks still run {seconds:.0f} s after {number.name}: {ranks}")
            time.sleep(0.05)
        return {"seconds": time.monotonic() - begin, "left": left}
