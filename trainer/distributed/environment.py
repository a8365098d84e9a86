"""Who this process is: what the launcher and the machine say, and what DeepSpeed and torch read on import."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch


def prepare_environment() -> None:
    """Sets what DeepSpeed and torch read from the environment on import. Call it before importing either room.

    Only variables that are not set are set: the accelerator (so that DeepSpeed does not guess, with a warning),
    the folder of compiled extensions (inside the virtual environment, so that its life is theirs), and the path
    to the `ninja` that lies beside this Python.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    own = Path(sys.prefix) / "share" / "tessera" / "extensions"
    if "TORCH_EXTENSIONS_DIR" not in os.environ and os.access(sys.prefix, os.W_OK):
        own.mkdir(parents=True, exist_ok=True)
        os.environ["TORCH_EXTENSIONS_DIR"] = str(own)
    beside = str(Path(sys.executable).parent)
    if beside not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([beside, os.environ.get("PATH", os.defpath)])


def local_device() -> Literal["cpu", "cuda"]:
    """The kind of device that this machine computes on."""
    return "cpu" if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available() else "cuda"


@dataclass(frozen=True)
class Launch:
    """What the launcher (`deepspeed`, `torchrun`, or none) says about this process."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Number of this process on its host."""

    local_world: int = 1
    """Processes on this host."""

    @property
    def is_on_one_host(self) -> bool:
        return self.local_world == self.world

    @classmethod
    def from_environment(cls) -> Launch:
        """Reads RANK and its kin; one process where there is no launcher."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            world=world,
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            local_world=int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", str(world)))),
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def complete_environment(launch: Launch) -> None:
    """DeepSpeed reads the launcher's variables; a plain `python` start has none."""
    alone = {
        "RANK": launch.rank,
        "WORLD_SIZE": launch.world,
        "LOCAL_RANK": launch.local_rank,
        "MASTER_ADDR": "127.0.0.1",
    }
    for name, value in alone.items():
        os.environ.setdefault(name, str(value))
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
