"""Bytes of model states on a rank, counted in the engine's own tensors, against the formula, for ZeRO 0 to 3."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.bench.common import configuration, table, write_tokens
from tools.ranks import run_ranks
from trainer.config.load import LoadedConfig
from trainer.distributed import Launch, World, joined_world
from trainer.engine import build_engine
from trainer.engine.plain import PlainEngine
from trainer.model import build_model, model_cost, state_bytes
from trainer.topology import Topology

QUICK: dict[str, Any] = {"size": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--world", type=int, default=2, help="data ranks (default 2)")
    parser.add_argument("--size", type=int, default=5, choices=(1, 5, 25), help="millions of parameters (default 5)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    cases = [(stage, half) for half in (False, True) for stage in (0, 1, 2, 3)]
    figures, rows = {}, []
    with tempfile.TemporaryDirectory() as name:
        write_tokens(Path(name))
        by_rank = run_ranks(measure, options.world, name, options.size, cases)
    for number, (stage, half) in enumerate(cases):
        worst = max((rank[number] for rank in by_rank), key=lambda m: sum(m["counted"].values()))
        counted, formula = sum(worst["counted"].values()), sum(worst["formula"].values())
        figures[f"zero{stage}-{'bf16' if half else 'fp32'}"] = worst
        parts = "  ".join(f"{k} {v / 1e6:.2f}" for k, v in worst["counted"].items())
        rows.append(
            (
                stage,
                "bf16" if half else "fp32",
                f"{counted / 1e6:.2f}",
                f"{formula / 1e6:.2f}",
                f"{100 * (counted / formula - 1):+.2f} %",
                parts,
            )
        )
    print(f"model states of {options.size} M parameters on each of {options.world} ranks, MB")
    print(table(("ZeRO", "type", "counted", "formula", "difference", "counted parts"), rows))
    return figures


def measure(folder: str, size: int, cases: list[tuple[int, bool]]) -> list[dict[str, dict[str, float]]]:
    """Bytes on this rank, and those of the formula, by part, for each (ZeRO stage, half precision)."""
    launch = Launch.from_environment()
    with joined_world(launch, Topology.of(launch.world_size, launch.rank), seed=1) as world:
        return [_measure(Path(folder), size, stage, half, world) for stage, half in cases]


def _measure(folder: Path, size: int, stage: int, half: bool, world: World) -> dict[str, dict[str, float]]:
    ranks = world.topology.world_size
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    settings = {"zero_optimization": zero, "bf16": {"enabled": half}, "gradient_accumulation_steps": 2}
    loaded = configuration(folder, size, world=ranks, **settings)
    engine = build_engine(build_model(loaded), loaded, world)
    assert isinstance(engine, PlainEngine)
    formula = state_bytes(model_cost(build_model(loaded)).parameters, stage=stage, data_ranks=ranks, half=half)
    return {"counted": _count(engine, loaded), "formula": formula}


def _count(engine: PlainEngine, loaded: LoadedConfig) -> dict[str, float]:
    """In the middle of the second step: the moments exist, and the gradients still accumulate."""
    inner = engine.deepspeed_engine
    ids = torch.zeros((loaded.batch.micro_batch_size, 64), dtype=torch.long)
    for micro_batch in range(3):
        loss = inner(ids, input_ids=ids)
        inner.backward(loss.objective / ids.numel())
        if micro_batch < 2:
            inner.step()
    seen: set[int] = set()
    weights = _bytes((t for p in inner.module.parameters() for t in (getattr(p, "ds_tensor", None), p.data)), seen)
    gradients = _bytes(_gradients(inner), seen)
    masters = _bytes(_masters(inner.optimizer), seen)
    states = getattr(inner.optimizer, "optimizer", inner.optimizer).state.values()
    moments = _bytes((t for state in states for t in state.values()), seen)
    return {"weights": weights, "gradients": gradients, "master weights": masters, "optimizer moments": moments}


def _bytes(tensors: Iterator[Any], seen: set[int]) -> float:
    total = 0
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.numel() <= 1:
            continue
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _gradients(inner: Any) -> Iterator[Any]:
    yield from (p.grad for p in inner.module.parameters())
    optimizer = inner.optimizer
    for name in (
        "averaged_gradients",
        "all_grad_tensors",
        "fp32_groups_gradients_flat_partition",
        "fp32_groups_gradients_flat",
    ):
        held = getattr(optimizer, name, None)
        groups = held.values() if isinstance(held, dict) else held or ()
        for group in groups:
            yield from group if isinstance(group, list | tuple) else [group]


def _masters(optimizer: Any) -> Iterator[Any]:
    for name in (
        "single_partition_of_fp32_groups",
        "fp32_partitioned_groups_flat",
        "fp32_groups_flat_partition",
        "fp32_groups_flat",
        "fp32_groups",
    ):
        for group in getattr(optimizer, name, None) or ():
            yield from group if isinstance(group, list | tuple) else [group]
