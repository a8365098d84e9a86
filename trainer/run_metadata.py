"""Metadata of a run: package versions, git commit, world layout."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

from trainer.config import LoadedConfig

_PACKAGES = ("tessera", "torch", "deepspeed", "transformers", "tokenizers", "datasets", "wandb")
_GIT_TIMEOUT_SECONDS = 10


def run_metadata(loaded: LoadedConfig) -> dict[str, Any]:
    """Return versions, commit and layout of a run, and the defaults of an earlier version that it keeps."""
    parallel = loaded.config.parallel
    return {
        "versions": package_versions(loaded.config.run.plugins),
        "git_commit": _git_commit(),
        "world": {
            "processes": loaded.world_size,
            "data": loaded.data_ranks,
            "pipeline": parallel.pipeline,
            "tensor": parallel.tensor,
        },
        "steps": loaded.known_steps,
        "kept_meanings": list(loaded.legacy_defaults.keys),
    }


def package_versions(plugins: Sequence[str]) -> dict[str, str]:
    """Return the versions of Python, of the packages that a run computes with, and of its plugins' packages."""
    versions = {"python": platform.python_version()}
    distributions = packages_distributions() if plugins else {}
    owners = [owner for name in plugins for owner in distributions.get(name.partition(".")[0], ())]
    for name in (*_PACKAGES, *owners):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _git_commit() -> str | None:
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
