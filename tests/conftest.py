"""Shared fixtures: small text, small configurations, and no leftovers in shared memory."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_SILENT"] = "true"
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # DeepSpeed's Muon compiles its kernels, half a minute a process

import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# A job in the background of a script, or below nohup, begins with these ignored, and so would all of its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

from trainer.distributed import prepare_environment, remove_stale_buffers

prepare_environment()

from tests.configs import tiny_config


@pytest.fixture(scope="session", autouse=True)
def _no_stale_buffers() -> Iterator[None]:
    remove_stale_buffers()
    yield
    remove_stale_buffers()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write documents of very different length, so that micro-batches hold uneven numbers of tokens."""
    words = "the quick brown fox jumps over a lazy dog while seven wizards brew potions of quartz and jade"
    choices = words.split()
    draw = random.Random(7)
    folder = tmp_path_factory.mktemp("corpus")
    for name, count in (("train", 400), ("validation", 45)):
        lines = []
        for _ in range(count):
            text = " ".join(draw.choice(choices) for _ in range(int(draw.paretovariate(0.9)) % 60 + 2))
            lines.append(json.dumps({"text": text}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny(corpus: Path, shared_cache: Path, tmp_path: Path) -> dict[str, Any]:
    """Return a valid configuration of a model with some 20,000 parameters."""
    return tiny_config(corpus, shared_cache, tmp_path / "run")


@pytest.fixture(scope="module")
def base(corpus: Path, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the same configuration for all tests of a module; a module overrides it to change values."""
    return tiny_config(corpus, shared_cache, tmp_path_factory.mktemp("runs"))
