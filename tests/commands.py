"""Paths of the commands, and the rows that a run writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TRAIN, GENERATE = (str(ROOT / "launch" / f"{name}.py") for name in ("train", "generate"))
TRAIN_KEYS = [
    "step",
    "split",
    "attempt",
    "epoch",
    "tokens",
    "samples",
    "loss",
    "grad_norm",
    "learning_rate",
    "step_seconds",
    "tokens_per_second",
    "tokens_per_second_per_device",
    "mfu",
    "memory_bytes_max",
    "data_wait_seconds",
]
"""Keys of a training row, in their order."""


def read_rows(run: Path) -> list[dict[str, Any]]:
    """Return the rows of `metrics.jsonl`."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
