"""Golden values: results of an earlier version, compared with those of this version.

`python -m tests.golden NAME` writes a file that does not exist yet; `--replace` overwrites one, which is right only
where a release changes the values on purpose and says so in CHANGELOG.md.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.configs import tiny_config, with_values
from tests.harness import run_ranks
from tests.training_jobs import train
from trainer.data.indexed import IndexedWriter
from trainer.data.order import SampleOrder
from trainer.distributed import seed_everything
from trainer.model import initialize_weights
from trainer.tensor_parallel.region import Region
from trainer.topology import Topology

FOLDER = Path(__file__).parent
STEPS = 20

_WORDS = ("the quick brown fox jumps over a lazy dog", "while seven wizards brew potions of quartz and jade")
_SCHEDULE = {
    "type": "WarmupDecayLR",
    "params": {"total_num_steps": STEPS, "warmup_min_lr": 0.0, "warmup_max_lr": 0.002, "warmup_num_steps": 5},
}

CURVES: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (
        1,
        {
            "data__packing": "concatenate",
            "deepspeed__scheduler": _SCHEDULE,
            "deepspeed__optimizer": {"type": "AdamW", "params": {"lr": 0.002, "eps": 1e-3, "weight_decay": 0.1}},
        },
    ),
    "tensor 2": (
        2,
        {
            "parallel": {"tensor": 2, "sequence_parallel": True},
            "training__label_smoothing": 0.1,
            "training__z_loss": 1e-3,
            "deepspeed__zero_optimization": {"stage": 1},
        },
    ),
    "pipeline 2, data 2": (
        4,
        {
            "parallel": {"pipeline": 2},
            "deepspeed__zero_optimization": {"stage": 1},
            "deepspeed__optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        },
    ),
}
"""By name: number of ranks, changes of the tiny configuration."""


def write_corpus(folder: Path) -> None:
    """Write documents of 2 to 61 words. Only `Random.random` is called: its values are the same in every Python."""
    draw = random.Random(7)
    words = " ".join(_WORDS).split()
    for name, count in (("train", 300), ("other", 80), ("validation", 45)):
        lines = []
        for _ in range(count):
            length = int(draw.random() ** 3 * 60) + 2
            text = " ".join(words[int(draw.random() * len(words))] for _ in range(length))
            lines.append(json.dumps({"text": text}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def losses(name: str, folder: Path) -> dict[str, Any]:
    """Train one of `CURVES` in an empty folder. Return losses, gradient norms and the held-out loss before it."""
    write_corpus(folder)
    world, values = CURVES[name]
    config = with_values(tiny_config(folder, folder / "cache", folder / "run"), **values)
    config["data"]["train"].append({"path": str(folder / "other.jsonl"), "weight": 0.5})
    config["training"]["max_steps"] = STEPS
    curve, _, held_out = run_ranks(train, world, [(config, STEPS)])[0][0]
    return {"losses": [row[0] for row in curve], "norms": [row[1] for row in curve], "held_out_loss": held_out}


ORDERS = {
    "mixture": SampleOrder((100, 37), (1.0, 0.5), 3),
    "repeated source": SampleOrder((7, 3), (2.0, 1.5), 1234),
    "one source": SampleOrder((1000,), (1.0,), 0),
}


def sample_orders() -> dict[str, Any]:
    """Return the first 64 (source, sample) of each of `ORDERS`, and 16 from the middle of its fifth epoch."""
    orders = {}
    for name, order in ORDERS.items():
        late = 9 * order.epoch_samples // 2
        positions = [*range(64), *range(late, late + 16)]
        source, sample = order.lookup(positions)
        orders[name] = {"positions": positions, "source": source.tolist(), "sample": sample.tolist()}
    return orders


STREAMS: list[tuple[int, Topology, int]] = [
    (11, Topology.of(1, 0), 0),
    (11, Topology.of(1, 0), 7),
    (11, Topology.of(8, 5, pipeline=2, tensor=2), 7),
    (2**62, Topology.of(8, 2, pipeline=2, tensor=2), 100_000),
]
"""(`run.seed`, topology, step)."""


def _first_numbers() -> dict[str, list[float]]:
    return {
        "python": [random.random() for _ in range(2)],
        "numpy": np.random.random(2).tolist(),
        "torch": torch.rand(4).tolist(),
    }


def random_streams() -> list[dict[str, Any]]:
    """Return the first numbers of every generator after seeding, and of each tensor rank inside a tensor region."""
    streams = []
    for seed, topology, step in STREAMS:
        seed_everything(seed, topology, step)
        streams.append({"seed": seed, "rank": topology.rank, "step": step, **_first_numbers()})
    for rank in range(2):
        seed_everything(11, Topology.of(2, rank, tensor=2), 7)
        region = Region(None, 2, rank, has_dropout=True)
        region.use_rank_local_rng(torch.device("cpu"))
        apart = torch.rand(4).tolist()
        region.use_shared_rng(torch.device("cpu"))
        streams.append({"seed": 11, "tensor_rank": rank, "apart": apart, "together": torch.rand(4).tolist()})
    return streams


def initial_weights() -> dict[str, list[float]]:
    """Return the first four values of each weight of a small Llama under `run.seed` 11."""
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    initialize_weights(model, 11)
    return {name: weight.flatten()[:4].tolist() for name, weight in model.named_parameters()}


def token_file(folder: Path) -> dict[str, str]:
    """Return the bytes, in hexadecimal, of the two files that hold three documents of 16-bit ids."""
    with IndexedWriter(folder / "tokens", np.uint16) as writer:
        writer.add([1, 2, 3])
        writer.extend([65499])
        writer.extend([0, 7])
        writer.end()
        writer.add([])
    return {suffix: (folder / f"tokens.{suffix}").read_bytes().hex() for suffix in ("bin", "idx")}


def curves(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train each of `CURVES`, in separate folders."""
    for name in CURVES:
        below = folder / name.replace(" ", "-")
        below.mkdir()
        yield name, losses(name, below)


FILES: dict[str, Callable[[Path], Any]] = {
    "losses": lambda folder: dict(curves(folder)),
    "sample_orders": lambda folder: sample_orders(),
    "random_streams": lambda folder: random_streams(),
    "initial_weights": lambda folder: initial_weights(),
    "token_file": token_file,
}
"""By name of the golden file: a function that computes its content in an empty folder."""


def golden(name: str) -> Any:
    """Read a golden file."""
    return json.loads((FOLDER / f"{name}.json").read_text())
