"""Who this process is: what the launcher and the machine say, and what DeepSpeed and torch read on import."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from trainer.compat.dependencies import exit_on_unsupported_versions
from trainer.errors import ConfigError, Problem

_LAUNCHER_REMEDY = "Launchers set this environment variable: start by deepspeed or torchrun, or unset it"


def prepare_environment() -> None:
    """Sets what DeepSpeed and torch read from the environment on import. Call it before importing either room.

    Only variables that are not set are set: the accelerator (so that DeepSpeed does not guess, with a warning),
    the folder of compiled extensions (inside the virtual environment, so that its life is theirs), and the path
    to the `ninja` that lies beside this Python.
    """
    exit_on_unsupported_versions()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    extensions_directory = Path(sys.prefix) / "share" / "tessera" / "extensions"
    if "TORCH_EXTENSIONS_DIR" not in os.environ and os.access(sys.prefix, os.W_OK):
        extensions_directory.mkdir(parents=True, exist_ok=True)
        os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_directory)
    scripts_directory = str(Path(sys.executable).parent)
    if scripts_directory not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([scripts_directory, os.environ.get("PATH", os.defpath)])


def local_device() -> Literal["cpu", "cuda"]:
    """The kind of device that this machine computes on."""
    return "cpu" if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available() else "cuda"


@dataclass(frozen=True)
class Launch:
    """What the launcher (`deepspeed`, `torchrun`, or none) says about this process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Number of this process on its host."""

    local_world_size: int = 1
    """Processes on this host."""

    @property
    def is_on_one_host(self) -> bool:
        return self.local_world_size == self.world_size

    @classmethod
    def from_environment(cls) -> Launch:
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; one process where there is no launcher.

        Raises:
            ConfigError: naming every variable that is not a number in its range.
        """
        problems: list[Problem] = []
        world_size = _read_count("WORLD_SIZE", "1", 1, None, problems)
        rank = _read_count("RANK", "0", 0, world_size, problems)
        uses_deepspeed_name = "LOCAL_SIZE" in os.environ and "LOCAL_WORLD_SIZE" not in os.environ
        local_size_name = "LOCAL_SIZE" if uses_deepspeed_name else "LOCAL_WORLD_SIZE"
        local_world_size = _read_count(local_size_name, str(world_size), 1, world_size + 1, problems)
        local_rank = _read_count("LOCAL_RANK", "0", 0, local_world_size, problems)
        if problems:
            raise ConfigError(problems)
        return cls(rank, world_size, local_rank, local_world_size)


def _read_count(name: str, default: str, minimum: int, stop: int | None, problems: list[Problem]) -> int:
    """The variable as a number from `minimum` up to, but not including, `stop`."""
    text = os.environ.get(name, default)
    expected = f"a number of at least {minimum}" if stop is None else f"a number from {minimum} to {stop - 1}"
    if text.isascii() and text.isdigit() and len(text) < 10 and minimum <= int(text) < (stop or 10**9):
        return int(text)
    problems.append(Problem(name, f"must be {expected} (got {text!r})", _LAUNCHER_REMEDY))
    return max(minimum, 1) if stop is None else minimum


def complete_environment(launch: Launch) -> None:
    """DeepSpeed reads the launcher's variables; a plain `python` start has none."""
    defaults = {
        "RANK": launch.rank,
        "WORLD_SIZE": launch.world_size,
        "LOCAL_RANK": launch.local_rank,
        "MASTER_ADDR": "127.0.0.1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, str(value))
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(get_free_port())  # type: ignore[no-untyped-call]
