"""Helpers of the benchmarks: models of a given size, configurations, the parts of a run, token files, tables."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from trainer.config.load import LoadedConfig, check_config
from trainer.config.model_config import scrub
from trainer.data.indexed import IndexedWriter

VOCABULARY = 4096
LENGTH = 256

SIZES: dict[int, dict[str, int]] = {
    1: {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4},
    5: {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8},
    25: {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 7, "num_attention_heads": 8},
}
"""Llama configurations by their approximate number of parameters in millions."""


def write_tokens(folder: Path, documents: int = 400) -> Path:
    """Write random tokens as a token file. Return its path, for `data.train`."""
    draw = np.random.default_rng(0)
    with IndexedWriter(folder / "tokens", np.uint16) as writer:
        for _ in range(documents):
            writer.add(draw.integers(0, VOCABULARY, 2048).tolist())
    return folder / "tokens.bin"


def settings(folder: Path, millions: int, *, batch: int = 8, world: int = 1, **deepspeed: Any) -> dict[str, Any]:
    """Return the JSON configuration of a Llama of about `millions` parameters on the file of `write_tokens`."""
    model = {"model_type": "llama", "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, **SIZES[millions]}
    return {
        "run": {"output_dir": str(folder / "run")},
        "model": {"config": model},
        "data": {"train": [{"path": str(folder / "tokens.bin")}], "sequence_length": LENGTH},
        "training": {"max_steps": 100_000},
        "checkpoint": {"resume": "never"},
        "deepspeed": {
            "train_batch_size": batch * world * deepspeed.get("gradient_accumulation_steps", 1),
            "train_micro_batch_size_per_gpu": batch,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
            "gradient_clipping": 1.0,
            **deepspeed,
        },
    }


def configuration(folder: Path, millions: int, *, batch: int = 8, world: int = 1, **deepspeed: Any) -> LoadedConfig:
    """Return the checked configuration of `settings`."""
    return check_config(
        settings(folder, millions, batch=batch, world=world, **deepspeed), world_size=world, device="cpu"
    )


def inline(config: PreTrainedConfig) -> dict[str, Any]:
    """Return a Hugging Face configuration as a value of `model.config`."""
    unwanted = ("transformers_version", "dtype", "architectures")
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in scrub(fields).items() if key not in unwanted}


def rank_environment(rank: int, world: int, port: int) -> None:
    """Make this process a rank, as a launcher does."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format rows as a table."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
