"""Context shared by finding and saving the checkpoints of one attempt: configuration, folder, remote copies, ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainer.checkpoint.object_store import ObjectStore
from trainer.config import LoadedConfig
from trainer.distributed import JOIN_TIMEOUT, World, agree, run_on_rank_zero
from trainer.errors import CheckpointError
from trainer.run_directory import RunDirectory
from trainer.run_layout import CHECKPOINTS

T = TypeVar("T")


@dataclass(frozen=True)
class RunRecord:
    """What every checkpoint records of its run in addition to the configuration and the training state."""

    model: Mapping[str, Any]
    """Description that rebuilds the model without its weights."""

    data: Mapping[str, Any]
    """Fingerprint of the training data and their order."""

    evaluated_samples: Sequence[int] = ()
    """Validation samples of each source."""


@dataclass(frozen=True)
class CheckpointContext:
    """The checkpoints of one attempt of a run, as one rank sees them."""

    loaded: LoadedConfig
    directory: RunDirectory
    world: World
    record: RunRecord
    group: dist.ProcessGroup | None
    """See `checkpoint_group`."""

    upload: ObjectStore | None
    """`checkpoint.upload`."""

    @classmethod
    def open(cls, loaded: LoadedConfig, directory: RunDirectory, world: World, record: RunRecord) -> CheckpointContext:
        """Create the process group and connect to `checkpoint.upload`. Collective: all ranks must call it.

        Raises:
            ConfigError: on all ranks: `checkpoint.upload` cannot be reached.
        """
        group, url = checkpoint_group(), loaded.config.checkpoint.upload
        return cls(
            loaded, directory, world, record, group, agree(partial(ObjectStore.connect, url), group) if url else None
        )

    @property
    def folder(self) -> Path:
        return self.directory.path / CHECKPOINTS

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    def rank_share(self, items: Sequence[T]) -> Sequence[T]:
        """Return every `world_size`-th item, so that the ranks together cover all items once."""
        return items[self.rank :: self.world_size]

    def agree(self, work: Callable[[], T]) -> T:
        """Return this rank's result. Collective: all ranks must call it; see `agree`.

        Raises:
            CheckpointError: on all ranks: `work` raised OSError on one of them.
        """
        return agree(work, self.group, translate=_as_checkpoint_error)

    def on_rank_zero(self, work: Callable[[], T]) -> T:
        """Return rank 0's result on all ranks. Collective: all ranks must call it; see `run_on_rank_zero`.

        Raises:
            CheckpointError: on all ranks: `work` raised OSError.
        """
        return run_on_rank_zero(work, self.group, translate=_as_checkpoint_error)


def checkpoint_group() -> dist.ProcessGroup | None:
    """Create a group of all ranks for objects in host memory. Collective: all ranks must call it.

    Only checkpoints use it, because a background thread may communicate over it while training uses the default group.
    Its timeout is long: its collectives wait for the rank that writes or uploads the most.
    """
    if dist.get_world_size() == 1 and not torch.cuda.is_available():
        return None
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=JOIN_TIMEOUT)
    return group


def _as_checkpoint_error(error: Exception) -> Exception:
    return CheckpointError(str(error)) if isinstance(error, OSError) else error
