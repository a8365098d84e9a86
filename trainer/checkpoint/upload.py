"""Copying a saved checkpoint to `checkpoint.upload`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch.distributed as dist

from trainer.checkpoint.context import CheckpointContext
from trainer.checkpoint_format import MANIFEST
from trainer.errors import CheckpointError


def upload_checkpoint(
    context: CheckpointContext,
    folder: Path,
    files: Sequence[str],
    *,
    deleted: Sequence[str],
    advance: Callable[[], None],
) -> CheckpointError | None:
    """Copy a checkpoint to `checkpoint.upload`. Collective: all ranks must call it.

    An object store has no rename. A copy is complete once it has a manifest, so the order matters: remove the manifest
    of an older copy of this name, copy the files (each rank its own), copy the manifest, delete expired copies.

    Args:
        context: Context with `upload` set.
        folder: Folder of the checkpoint.
        files: Names of this rank's files.
        deleted: Names of expired checkpoints; only rank 0's are deleted.
        advance: Called after each file that this rank has copied.

    Returns:
        The first failure of any rank, on rank 0 at least; None if there is none.
    """
    upload = context.upload
    assert upload is not None
    # Not on_rank_zero: an upload that fails on one rank must not keep the others from the collectives below.
    outcome = [error_of(partial(upload.invalidate, folder.name)) if context.rank == 0 else None]
    dist.broadcast_object_list(outcome, src=0, group=context.group)

    def upload_files() -> None:
        for name in files:
            upload.upload(folder, [name])
            advance()

    failure = outcome[0] or error_of(upload_files)
    failures: list[str | None] = [None] * context.world_size
    dist.all_gather_object(failures, None if failure is None else str(failure), group=context.group)
    if context.rank == 0 and not any(failures):
        failure = error_of(partial(upload.upload, folder, [MANIFEST])) or error_of(partial(upload.delete, *deleted))
        failures = [None if failure is None else str(failure)]
    first = next(filter(None, failures), None)
    return None if first is None else CheckpointError(f"{folder} was not copied to {upload.url}: {first}")


def error_of(work: Callable[[], object]) -> CheckpointError | None:
    """Run `work`, and return its exception, of whatever type the file system raises, as an error of the checkpoint."""
    try:
        work()
    except Exception as error:
        return CheckpointError(f"{type(error).__name__}: {error}")
    return None
