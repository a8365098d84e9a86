"""Idle share of the pipeline's schedule with stages that sleep, bytes over each boundary, parameters of a rank."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed.runtime.pipe.engine as deepspeed_pipe
import torch
from torch import Tensor, nn

from tools.bench.common import inline, table
from tools.parity.shrink import tiny
from tools.ranks import run_ranks
from trainer.assembly import plan_model
from trainer.config.load import LoadedConfig, check_config
from trainer.data.batches import StepBatch
from trainer.distributed import Launch, joined_world
from trainer.engine import build_engine
from trainer.engine.pipeline import PipelineEngine
from trainer.model import build_model
from trainer.pipeline import local_parameters
from trainer.tasks import MicroBatch
from trainer.topology import Topology

FORWARD_SECONDS = 0.05
"""Seconds that a stage sleeps in a forward pass; a backward pass takes twice as long."""

BATCH, LENGTH, HIDDEN = 2, 32, 64
_STATE = BATCH * LENGTH * HIDDEN * 4
"""Bytes of a hidden state of a micro-batch in fp32."""


@dataclass(frozen=True)
class Case:
    """One pipeline."""

    model_type: str
    stages: int
    micro_batches: int
    tensor: int = 1
    sequence_parallel: bool = False
    layers: int = 1
    """Of each stage."""

    schedule: str = "1f1b"

    sleeps: bool = False


@dataclass(frozen=True)
class Measured:
    """Measurements of one rank in the second step."""

    stage: int
    idle: float
    sent: dict[tuple[int, int], int]
    """Bytes by (from, to) stage."""

    held: int
    share: int
    """Actual and expected parameters of this rank."""


class _Sleep(torch.autograd.Function):
    """Sleeps in both passes and is an identity otherwise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        time.sleep(FORWARD_SECONDS)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        time.sleep(2 * FORWARD_SECONDS)
        return gradient


def _loaded(case: Case, world: int) -> LoadedConfig:
    stages = case.stages * (2 if case.schedule == "dualpipev" else 1)
    config = tiny(case.model_type, num_hidden_layers=stages * case.layers, hidden_size=HIDDEN)
    if case.model_type == "mixtral":
        config.output_router_logits = True
    raw = {
        "run": {"output_dir": "/tmp/unused"},
        "model": {"config": inline(config)},
        "parallel": {
            "tensor": case.tensor,
            "pipeline": case.stages,
            "sequence_parallel": case.sequence_parallel,
            "pipeline_layers": [case.layers] * stages,
            "pipeline_schedule": case.schedule,
        },
        "data": {"train": [{"path": "builtin:python-stdlib"}], "sequence_length": LENGTH},
        "training": {"max_steps": 2},
        "deepspeed": {
            "train_micro_batch_size_per_gpu": BATCH,
            "gradient_accumulation_steps": case.micro_batches,
            "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
        },
    }
    return check_config(raw, world_size=world, device="cpu")


def _batch(case: Case, vocabulary: int) -> StepBatch:
    draw = torch.Generator().manual_seed(1)
    micro = []
    for _ in range(case.micro_batches):
        ids = torch.randint(5, vocabulary, (BATCH, LENGTH + 1), generator=draw)
        labels = ids[:, 1:].contiguous()
        micro.append(MicroBatch({"input_ids": ids[:, :-1].contiguous()}, labels, labels.numel()))
    return StepBatch(tuple(micro), case.micro_batches * BATCH * LENGTH, case.micro_batches * BATCH)


def _sleep_in(models: list[nn.Module], names: list[str]) -> None:
    """Once for each stage: in the last one of its layers."""
    for model in models:
        layers = [name for name in names if any(True for _ in model.get_submodule(name).parameters())]
        last = model.get_submodule(layers[-1])
        last.register_forward_hook(lambda module, args, output: _Sleep.apply(output), prepend=True)


def measure(cases: list[Case]) -> list[Measured]:
    """Measure on every rank; all cases have the same number of stages and tensor ranks."""
    launch = Launch.from_environment()
    topology = Topology.of(launch.world_size, launch.rank, pipeline=cases[0].stages, tensor=cases[0].tensor)
    with joined_world(launch, topology, seed=1) as world:
        return [_measure(case, launch, world) for case in cases]


def _measure(case: Case, launch: Launch, world: Any) -> Measured:
    loaded = _loaded(case, launch.world_size)
    plan = plan_model(loaded)
    shape, assignment = plan.shape, plan.assignment
    engine = build_engine(build_model(loaded), loaded, world, assignment)
    assert isinstance(engine, PipelineEngine)
    assert assignment is not None
    if case.sleeps:
        _sleep_in(engine.models, [name for unit in assignment.dataflow.units for name in unit])
    stage = world.topology.pipeline_rank
    batch = _batch(case, loaded.facts.vocabulary_size)
    engine.train_step(batch)
    sent: Counter[tuple[int, int]] = Counter()
    send = deepspeed_pipe.p2p.send

    def counting(tensor: Tensor, to: int, *args: Any, **kwargs: Any) -> Any:
        sent[stage, to] += tensor.nbytes
        return send(tensor, to, *args, **kwargs)

    deepspeed_pipe.p2p.send = counting
    try:
        result = engine.train_step(batch)
    finally:
        deepspeed_pipe.p2p.send = send
    assert result.idle_share is not None
    holders = assignment.parameter_ranks(shape)
    whole = {name: parameter.numel() for name, parameter in shape.named_parameters()}
    share = sum(count for name, count in whole.items() if stage in holders[name]) // case.tensor
    held = sum(parameter.numel() for pieces in local_parameters(engine.models).values() for parameter, _ in pieces)
    return Measured(stage, result.idle_share(), dict(sent), held, share)


CASES = {
    "llama": Case("llama", 4, 8, layers=2),
    "mixtral": Case("mixtral", 4, 8, layers=2),
    "llama, tensor 2": Case("llama", 2, 8, tensor=2, layers=2),
    "llama, tensor 2, sequence": Case("llama", 2, 8, tensor=2, sequence_parallel=True, layers=2),
}
"""Pipelines whose boundaries and parameters are measured."""

QUICK: dict[str, Any] = {"stages": [2], "micro_batches": [4], "cases": ["llama, tensor 2"]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3, 4], help="pipelines (default 2 3 4)")
    parser.add_argument("--micro_batches", type=int, nargs="+", default=[4, 8, 16, 32], help="default 4 8 16 32")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), help="default: all")


def run(options: argparse.Namespace) -> dict[str, Any]:
    figures: dict[str, Any] = {"forward_seconds": FORWARD_SECONDS, "idle": [], "boundaries": [], "parameters": []}
    for stages in options.stages:
        figures["idle"] += _idle(stages, options.micro_batches)
    print(
        f"Idle share of a step, stages that sleep {1000 * FORWARD_SECONDS:.0f} ms forward, "
        f"{2000 * FORWARD_SECONDS:.0f} ms backward.\n"
    )
    rows = [
        (
            f["schedule"],
            f["ranks"],
            f["micro_batches"],
            f"{f['theory']:.2%}",
            f"{f['measured']:.2%}",
            f"{100 * (f['measured'] - f['theory']):+.2f}",
        )
        for f in figures["idle"]
    ]
    print(table(("schedule", "ranks", "micro-batches", "theory", "measured", "points more"), rows))
    for name in options.cases:
        case = CASES[name]
        for measured in (rank[0] for rank in run_ranks(measure, case.stages * case.tensor, [case])[:: case.tensor]):
            figures["boundaries"] += _boundaries(name, measured, case.micro_batches)
            figures["parameters"].append(
                {"case": name, "stage": measured.stage, "share": measured.share, "held": measured.held}
            )
    print(
        f"\nSent of a micro-batch by a rank. A hidden state: {BATCH} x {LENGTH} x {HIDDEN} in fp32, {_STATE} bytes.\n"
    )
    rows = [
        (
            f["case"],
            f"{f['from']} to {f['to']}",
            "activations" if f["to"] > f["from"] else "gradients",
            f"{f['bytes_of_a_micro_batch']:.0f}",
            f"{f['hidden_states']:.4f}",
        )
        for f in figures["boundaries"]
    ]
    print(table(("model", "stages", "what", "bytes", "hidden states"), rows))
    print("\nParameters of a stage's first rank.\n")
    rows = [
        (f["case"], f["stage"], f"{f['share']:,}", f"{f['held']:,}", f"{f['held'] / f['share'] - 1:+.2%}")
        for f in figures["parameters"]
    ]
    print(table(("model", "stage", "share", "held", "more"), rows))
    return figures


def _idle(stages: int, micro_batches: list[int]) -> Iterator[dict[str, Any]]:
    """Return the idle share of a pipeline's ranks under each schedule, by formula and measured."""
    cases = [
        Case("llama", stages, count, sleeps=True, schedule=schedule)
        for schedule in ("1f1b", "dualpipev")
        for count in micro_batches
        if schedule == "1f1b" or count >= 2 * stages
    ]
    by_rank = run_ranks(measure, stages, cases)
    for number, case in enumerate(cases):
        yield {
            "schedule": case.schedule,
            "ranks": stages,
            "micro_batches": case.micro_batches,
            "theory": _loaded(case, stages).config.parallel.bubble(case.micro_batches),
            "measured": sum(rank[number].idle for rank in by_rank) / stages,
        }


def _boundaries(name: str, measured: Measured, micro_batches: int) -> Iterator[dict[str, Any]]:
    for (source, to), count in sorted(measured.sent.items()):
        each = count / micro_batches
        yield {
            "case": name,
            "from": source,
            "to": to,
            "bytes_of_a_micro_batch": each,
            "hidden_states": each / _STATE,
        }
