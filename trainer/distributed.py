"""Joins the world: who this process is, its device, process groups, seeds, logs, and what killed runs left behind."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock

from trainer.errors import ConfigError, TesseraError
from trainer.topology import Axis, Topology

log = logging.getLogger(__name__)

T = TypeVar("T")

_SHARED_MEMORY = Path("/dev/shm")
_BUFFERS = "deepspeed_allreduce_buffer_*"


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


@dataclass(frozen=True)
class World:
    """A joined world, as one rank sees it."""

    topology: Topology
    device: torch.device
    seed: int
    """`run.seed`."""

    groups: dict[Axis, Any]
    """The process group of this rank along each axis of more than one rank; None stands for all ranks."""

    _neighbours: dict[int, Any] = field(default_factory=dict, repr=False)
    _of_stages: dict[tuple[int, ...], Any] = field(default_factory=dict, repr=False)

    @property
    def is_first(self) -> bool:
        return self.topology.rank == 0

    def seed_step(self, step: int) -> None:
        """Before a step: its random numbers; see `seed_everything`."""
        seed_everything(self.seed, self.topology, step)

    def tensor_neighbours(self, count: int) -> Any:
        """The group of `count` neighbouring tensor ranks that this rank is in: those that share a key/value head.

        Every rank of the world must ask for the same counts in the same order.
        """
        if count not in self._neighbours:
            for ranks in self.topology.groups("tensor"):
                for start in range(0, len(ranks), count):
                    group = dist.new_group(ranks[start : start + count])
                    if self.topology.rank in ranks[start : start + count]:
                        self._neighbours[count] = group
        return self._neighbours[count]

    def stages_group(self, stages: tuple[int, ...]) -> Any:
        """The group of the ranks at this rank's place in `stages`; None on a rank of another stage.

        Every rank of the world must ask for the same stages in the same order.
        """
        if stages not in self._of_stages:
            self._of_stages[stages] = None
            for ranks in self.topology.groups("pipeline"):
                members = [ranks[stage] for stage in stages]
                group = dist.new_group(members)
                if self.topology.rank in members:
                    self._of_stages[stages] = group
        return self._of_stages[stages]


class _Console(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stdout` is at the time: a progress bar puts itself in its place and keeps below the lines."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stdout


class _AtLeast(logging.Filter):
    """A level that nobody else can set, unlike a handler's own."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self._level = level

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= self._level


def configure_logging(rank: int, folder: Path | None = None) -> None:
    """Rank 0 speaks on the console; with a `folder`, every rank writes its own `rank-N.log` there.

    DeepSpeed's logger goes to the same places, on the console with errors only. Each logger has handlers of
    its own, because DeepSpeed sets the level of its handlers.
    """
    for name, console_level in (("trainer", logging.INFO), ("DeepSpeed", logging.ERROR)):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
        logger.propagate = False
        if name == "trainer":
            logger.setLevel(logging.INFO)
        if rank == 0:
            console = _Console()
            console.setFormatter(logging.Formatter("[tessera] %(message)s"))
            console.addFilter(_AtLeast(console_level))
            logger.addHandler(console)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(folder / f"rank-{rank}.log")
            file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            logger.addHandler(file)
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())


def remove_stale_buffers() -> int:
    """Removes the shared-memory files of killed ranks: 69 MB each, and nobody else ever does.

    Only files of this user that no living process has mapped. Returns how many were removed.
    """
    files = list(_SHARED_MEMORY.glob(_BUFFERS.replace("*", f"{os.getuid()}_*")))
    if not files:
        return 0
    mapped: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            mapped.update(
                line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines() if "/dev/shm/" in line
            )
    stale = [f for f in files if str(f) not in mapped]
    for file in stale:
        file.unlink(missing_ok=True)
    return len(stale)


def _unlink_own_buffer(launch: Launch) -> None:
    """Takes this rank's shared-memory file out of the folder once all ranks have it mapped.

    The memory stays theirs until they end, however they end: nothing is left for anybody to remove.
    """
    dist.barrier()
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    own = _BUFFERS.replace("*", f"{os.getuid()}_{address}_{port}_{launch.rank}")
    (_SHARED_MEMORY / own).unlink(missing_ok=True)


def load_extension(builder: str) -> None:
    """Loads one of DeepSpeed's compiled extensions, compiling it first where needed (a minute or several, once).

    A process killed while it compiles leaves a lock file on which every later start would wait for ever. All
    our compiling happens under a lock that the kernel releases, so a lock file found while holding that is stale.
    """
    from deepspeed.accelerator import get_accelerator

    found = get_accelerator().create_op_builder(builder)
    if found is None:
        return
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(str(root / ".tessera.lock")):
        for stale in root.rglob("lock"):
            log.warning("removing %s, left by a process that was killed while compiling", stale)
            stale.unlink(missing_ok=True)
        if not list(root.rglob(f"{found.name}.so")):
            log.info("compiling DeepSpeed's %s, once; this takes a minute or several", found.name)
        with contextlib.redirect_stdout(io.StringIO()):
            found.load(verbose=False)


def agree(work: Callable[[], T], group: Any = None) -> T:
    """This rank's result of `work`, which every rank of the group must call. An error on one rank is raised on all, so
    that no rank waits for one that has given up. Without a process group, just the result.

    Args:
        group: None stands for all ranks.

    Raises:
        ConfigError: with the problems of all ranks that have some.
        TesseraError: the first rank's, if it is another one.
    """
    if not dist.is_initialized():
        return work()
    result: T | None = None
    error: TesseraError | None = None
    try:
        result = work()
    except TesseraError as raised:
        error = raised
    gathered: list[TesseraError | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, error, group=group)
    errors = [found for found in gathered if found is not None]
    if errors and isinstance(errors[0], ConfigError):
        problems = (problem for found in errors if isinstance(found, ConfigError) for problem in found.problems)
        raise ConfigError(dict.fromkeys(problems))
    if errors:
        raise errors[0]
    return result  # type: ignore[return-value]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _complete_environment(launch: Launch) -> None:
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


def _process_groups(topology: Topology) -> dict[Axis, Any]:
    """This rank's group along each axis. Every rank makes every group, in the same order, as torch demands; none is
    made for an axis of one rank, or where the default group is the one."""
    own: dict[Axis, Any] = {}
    axes: tuple[Axis, ...] = ("pipeline", "data", "tensor")
    for axis in axes:
        groups = topology.groups(axis)
        if len(groups[0]) == 1:
            continue
        if len(groups) == 1:
            own[axis] = None
            continue
        for ranks in groups:
            group = dist.new_group(ranks)
            if topology.rank in ranks:
                own[axis] = group
    return own


def seed_everything(seed: int, topology: Topology, step: int = 0) -> None:
    """Seeds what draws random numbers in a step: dropout. Ranks that share their samples draw the same.

    The numbers of a step follow from the seed, the step and the place alone, so that no state has to be saved.
    """
    own = (seed * 1_000_003 + topology.data_rank * 7_919 + topology.stage * 104_729 + step * 15_485_863) % (1 << 63)
    random.seed(own)
    np.random.seed(own % (1 << 32))
    torch.manual_seed(own)


@contextlib.contextmanager
def joined_world(
    launch: Launch,
    topology: Topology,
    *,
    seed: int,
    timeout: timedelta = timedelta(minutes=30),
    patience: timedelta = timedelta(hours=24),
) -> Iterator[World]:
    """Joins all processes into one world; leaves it at the end.

    Args:
        timeout: how long a rank waits in a collective before it gives up on the others.
        patience: how long it waits for all to join; a host may have a corpus to tokenise first.
    """
    import deepspeed

    # DeepSpeed 0.19 calls collectives by names that torch 2.13 has renamed; the user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    kind = local_device()
    if kind == "cuda":
        torch.cuda.set_device(launch.local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // launch.local_world))
    _complete_environment(launch)
    if launch.local_rank == 0:
        removed = remove_stale_buffers()
        if removed:
            log.info("removed %d shared-memory files that killed ranks had left", removed)
    if topology.tensor > launch.local_world:
        log.warning(
            "parallel.tensor = %d is more than the %d processes of a host: every layer's sums cross the network. "
            "Take at most %d, and more pipeline or data ranks",
            topology.tensor, launch.local_world, launch.local_world,
        )  # fmt: skip
    if kind == "cpu":
        load_extension("ShareMemCommBuilder")
    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(
            dist_backend="gloo" if kind == "cpu" else "nccl", timeout=patience, auto_mpi_discovery=False, verbose=False
        )
    if kind == "cpu":
        _unlink_own_buffer(launch)
    dist.distributed_c10d._set_pg_timeout(timeout)
    device = torch.device(kind, launch.local_rank) if kind == "cuda" else torch.device("cpu")
    seed_everything(seed, topology)
    yield World(topology, device, seed, _process_groups(topology))
    # Not after an error: leaving the world would make the other ranks fail, and be ended, before this one has
    # said what was wrong.
    dist.destroy_process_group()
