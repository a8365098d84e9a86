"""Saving and loading against the disk itself: speed, the stall of an asynchronous save, bytes, memory, files."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tools.bench.common import configuration, table, write_tokens
from tools.ranks import run_ranks
from trainer.assembly import assemble
from trainer.checkpoint import CheckpointSaver, find_checkpoint
from trainer.checkpoint.load import load_state, scalar_state_of
from trainer.checkpoint.saved import checkpoint_name
from trainer.checkpoint_format import read_manifest, verify_files
from trainer.config import LoadedConfig
from trainer.distributed import Launch, World, joined_world
from trainer.engine import Engine
from trainer.progress import Progress
from trainer.run_directory import RunDirectory
from trainer.run_layout import CHECKPOINTS
from trainer.topology import Topology

QUICK: dict[str, Any] = {"size": 1, "rounds": 2}

_BLOCK = 1 << 22


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--world", type=int, default=2, help="data ranks (default 2)")
    parser.add_argument("--size", type=int, default=25, choices=(1, 5, 25), help="millions of parameters (default 25)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each measurement, interleaved (default 9)")
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="folder on the measured disk (default: the current folder)"
    )


@dataclass
class Measured:
    """Seconds of each round, and counted bytes."""

    write: list[float] = field(default_factory=list)
    """`dd conv=fsync` of the same bytes."""

    read: list[float] = field(default_factory=list)
    """Sequential read of the same bytes by one process."""

    save: list[float] = field(default_factory=list)
    stall: list[float] = field(default_factory=list)
    """Stall of training during an asynchronous save."""

    load: list[float] = field(default_factory=list)
    """Verification of every byte, and loading into the engine."""

    publish: list[float] = field(default_factory=list)
    """DeepSpeed's gathering of the weights on all ranks afterwards, as after a step."""

    bytes: int = 0
    minimum_bytes: int = 0
    """Bytes of the state itself."""

    files: int = 0
    extra_memory: int = 0
    """Peak of anonymous memory while a rank loads, in addition to that before."""


def run(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        write_tokens(Path(name))
        ranks = run_ranks(measure, options.world, name, options.size, options.world, options.rounds)
    measured: Measured = replace(ranks[0], extra_memory=max(rank.extra_memory for rank in ranks))
    middle = {
        key: statistics.median(getattr(measured, key)) for key in ("write", "read", "save", "stall", "load", "publish")
    }
    rows = [
        (
            "save, against dd conv=fsync",
            f"{middle['write'] / middle['save']:.2f} x",
            f"{measured.bytes / middle['save'] / 1e6:.0f} MB/s",
        ),
        (
            "load, against a sequential read",
            f"{middle['read'] / middle['load']:.2f} x",
            f"{measured.bytes / middle['load'] / 1e6:.0f} MB/s",
        ),
        ("gathering of the weights by DeepSpeed", "", f"{1e3 * middle['publish']:.0f} ms"),
        (
            "asynchronous stall, share of a save",
            f"{100 * middle['stall'] / middle['save']:.1f} %",
            f"{1e3 * middle['stall']:.0f} ms",
        ),
        (
            "bytes, relative to the minimum",
            f"{measured.bytes / measured.minimum_bytes:.4f} x",
            f"{measured.bytes / 1e6:.1f} MB",
        ),
        ("files", str(measured.files), f"{options.world} ranks"),
        ("memory in addition to the state, loading", f"{measured.extra_memory / 1e6:.1f} MB", ""),
    ]
    print(f"{options.size} M parameters, {options.world} ranks, ZeRO 1, median of {options.rounds} rounds")
    print(table(("", "", ""), rows))
    return {**asdict(measured), "median": middle}


def measure(folder: str, size: int, world_size: int, rounds: int) -> Measured:
    """Measure on one rank; times are those of rank 0, between barriers."""
    launch = Launch.from_environment()
    topology = Topology.of(launch.world_size, launch.rank)
    loaded = configuration(Path(folder), size, world=world_size, zero_optimization={"stage": 1})
    measured = Measured()
    with joined_world(launch, topology, seed=1) as world:
        trainer = assemble(loaded, world)
        engine, record = trainer.engine, trainer.resumption.context.record
        engine.train_step(trainer.batches.train.batch_at(1))

        def checkpoints(**values: Any) -> CheckpointSaver:
            section = loaded.config.checkpoint.model_copy(update=values)
            changed = replace(loaded, config=loaded.config.model_copy(update={"checkpoint": section}))
            return CheckpointSaver(find_checkpoint(changed, RunDirectory.examine(changed), world, record).context)

        at_once, later = (checkpoints(resume="never", keep_last=None, asynchronous=how) for how in (False, True))
        for number in range(rounds + 1):
            _round(number, engine, at_once, later, world, loaded, measured)
    return measured


def _round(
    number: int,
    engine: Engine,
    saver: CheckpointSaver,
    later: CheckpointSaver,
    world: World,
    loaded: LoadedConfig,
    measured: Measured,
) -> None:
    """Run one round. The first one warms up and is not counted."""
    folder = Path(loaded.config.run.output_dir) / CHECKPOINTS
    progress, topology = Progress(number + 1, 0, 0), world.topology
    save = _seconds(lambda: saver.save(engine, progress, {}))
    newest = folder / checkpoint_name(progress.step)
    files = sorted(newest.iterdir())
    stall = _seconds(lambda: later.save(engine, replace(progress, step=1000 + number), {}))
    later.close()
    # A first, discarded write: a disk is slow with data that it has just written. Then before and after the
    # measurement.
    reads = [_reading(files) if world.is_rank_zero else 0.0 for _ in range(2)][1:]
    if world.is_rank_zero:
        _forget(files)

    def load_all() -> None:
        manifest = read_manifest(newest)
        verify_files(newest, manifest, manifest.files[topology.rank :: topology.world_size])
        dist.barrier()
        load_state(engine.state, manifest, newest)

    with _anonymous_memory(measured):
        load = _seconds(load_all)
    publish = _seconds(lambda: engine.state.load_scalar_state(scalar_state_of(read_manifest(newest))))
    dist.barrier()
    write = 0.0
    if world.is_rank_zero:
        manifest = read_manifest(newest)
        measured.bytes = sum(file.stat().st_size for file in files)
        measured.files = len(files)
        width = {"F32": 4, "BF16": 2}
        measured.minimum_bytes = sum(s.numel * width[s.dtype] for s in manifest.tensors.values())
        reads.append(_reading(files))
        write = _dd(folder / "plain", measured.bytes)
    dist.barrier()
    if number:
        read = statistics.mean(reads)
        seconds = {"save": save, "stall": stall, "load": load, "publish": publish, "write": write, "read": read}
        for key, value in seconds.items():
            getattr(measured, key).append(value)


def _seconds(work: Callable[[], object]) -> float:
    dist.barrier()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _dd(path: Path, count: int) -> float:
    start = time.perf_counter()
    command = ["dd", "if=/dev/zero", f"of={path}", f"bs={_BLOCK}", f"count={-(-count // _BLOCK)}", "conv=fsync"]
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds * count / (-(-count // _BLOCK) * _BLOCK)


def _reading(files: list[Path]) -> float:
    _forget(files)
    start = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(_BLOCK):
                pass
    return time.perf_counter() - start


def _forget(files: list[Path]) -> None:
    """Drop files from the page cache, so that the next read goes to the disk."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@contextmanager
def _anonymous_memory(measured: Measured) -> Iterator[None]:
    """Record the peak of this process's anonymous memory; mapped files do not count."""
    before = most = _anonymous()
    stop = threading.Event()

    def look() -> None:
        nonlocal most
        while not stop.wait(0.002):
            most = max(most, _anonymous())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        measured.extra_memory = max(measured.extra_memory, most - before)


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
