"""Environment of a process: the launcher's variables, the device, and what DeepSpeed and torch read on import."""

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

_LAUNCHER_REMEDY = "Launchers set this environment variable: start with deepspeed or torchrun, or unset it"


def prepare_environment() -> None:
    """Set the environment variables that DeepSpeed and torch read on import.

    Must be called before either is imported. Existing variables are kept. Sets the accelerator (DeepSpeed would guess
    it, with a warning), the directory of compiled extensions (inside the virtual environment, with which it is deleted)
    and the path to the `ninja` of this Python.
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
    """Return the type of device that this machine computes on."""
    return "cpu" if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available() else "cuda"


@dataclass(frozen=True)
class Launch:
    """Position of this process among all processes, as the launcher (`deepspeed`, `torchrun`, or none) describes it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Rank among the processes of this host."""

    local_world_size: int = 1
    """Number of processes on this host."""

    @property
    def is_on_one_host(self) -> bool:
        """True if all processes run on this host."""
        return self.local_world_size == self.world_size

    @classmethod
    def from_environment(cls) -> Launch:
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; without a launcher there is one process.

        Raises:
            ConfigError: a variable is not a number in its range; names each of them.
        """
        problems: list[Problem] = []
        world_size = _read_count("WORLD_SIZE", "1", minimum=1, stop=None, problems=problems)
        rank = _read_count("RANK", "0", minimum=0, stop=world_size, problems=problems)
        uses_deepspeed_name = "LOCAL_SIZE" in os.environ and "LOCAL_WORLD_SIZE" not in os.environ
        local_size_name = "LOCAL_SIZE" if uses_deepspeed_name else "LOCAL_WORLD_SIZE"
        local_world_size = _read_count(
            local_size_name, str(world_size), minimum=1, stop=world_size + 1, problems=problems
        )
        local_rank = _read_count("LOCAL_RANK", "0", minimum=0, stop=local_world_size, problems=problems)
        if problems:
            raise ConfigError(problems)
        return cls(rank, world_size, local_rank, local_world_size)


def _read_count(name: str, default: str, *, minimum: int, stop: int | None, problems: list[Problem]) -> int:
    """Read a variable as a number from `minimum` up to, but not including, `stop`."""
    text = os.environ.get(name, default)
    expected = f"a number of at least {minimum}" if stop is None else f"a number from {minimum} to {stop - 1}"
    if text.isascii() and text.isdigit() and len(text) < 10 and minimum <= int(text) < (stop or 10**9):
        return int(text)
    problems.append(Problem(name, f"must be {expected} (got {text!r})", _LAUNCHER_REMEDY))
    return max(minimum, 1) if stop is None else minimum


def complete_environment(launch: Launch) -> None:
    """Set the launcher's variables, which DeepSpeed reads, for a process that was started without a launcher."""
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
