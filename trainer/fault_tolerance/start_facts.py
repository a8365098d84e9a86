"""Facts that must be equal on all ranks at the start: configuration, versions, source code, model files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import xxhash

import trainer
from trainer.config import LoadedConfig
from trainer.distributed import Launch, local_device
from trainer.fault_tolerance.comparison import Fact, flatten
from trainer.files import hash_file
from trainer.run_metadata import package_versions

_PER_HOST = ("data.cache_dir",)
"""Keys that may differ between hosts."""

_SECRET = ("checkpoint.upload",)
"""Keys whose values may contain a password: only their hash leaves the process."""

_SAME_CODE = "Install the same version of the project on every host"


def start_facts(loaded: LoadedConfig, launch: Launch, root: Path | None = None) -> Iterator[Fact]:
    """Yield all facts that do not depend on the data.

    Args:
        loaded: The configuration.
        launch: This process, as the launcher describes it.
        root: Directory of the packages `trainer` and `launch`; by default that of the imported ones.
    """
    yield Fact("WORLD_SIZE", launch.world_size, "Start all ranks with the same launcher command")
    yield Fact("device", local_device(), "Set DS_ACCELERATOR on all hosts or on none")
    for name, version in package_versions(loaded.config.run.plugins).items():
        yield Fact(f"version of {name}", version, "Install the same versions on every host")
    yield from _source_facts(Path(trainer.__file__).parent.parent if root is None else root)
    for key, value in flatten(loaded.resolved()).items():
        shown = xxhash.xxh3_64(str(value).encode()).hexdigest() if key in _SECRET and value is not None else value
        yield Fact(key, shown, is_per_host=key in _PER_HOST)
    output = Path(loaded.config.run.output_dir).expanduser().resolve()
    yield Fact("run.output_dir (resolved)", str(output), "Start all ranks in the same working directory", True)
    yield from _model_facts(loaded)


def _source_facts(root: Path) -> Iterator[Fact]:
    for file in [*sorted((root / "trainer").rglob("*.py")), root / "launch" / "train.py"]:
        if file.is_file():
            yield Fact(file.relative_to(root).as_posix(), hash_file(file)[:12], _SAME_CODE, group="source")


def _model_facts(loaded: LoadedConfig) -> Iterator[Fact]:
    """Yield facts of the configured model: its configuration, and the sizes and hashes of its files."""
    remedy = "Put the same model on every host"
    facts = {key: sorted(v) if isinstance(v, frozenset) else v for key, v in asdict(loaded.facts).items()}
    for key, value in facts.items():
        yield Fact(f"model: {key}", value, remedy, group="model")
    path = loaded.config.model.path
    if path is None or not (folder := Path(path).expanduser()).is_dir():
        return
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".bin") and file.is_file():
            value = hash_file(file)[:12] if file.suffix == ".json" else f"{os.stat(file).st_size} bytes"
            yield Fact(f"model.path: {file.name}", value, remedy, group="model")
