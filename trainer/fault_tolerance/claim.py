"""A start takes a run directory: rank 0 locks and examines it, and all ranks decide alike."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.config import LoadedConfig
from trainer.distributed import Launch
from trainer.distributed.store import JOIN_PATIENCE, Store
from trainer.errors import ConfigError, Problem
from trainer.fault_tolerance.run_lock import RunLock
from trainer.run_directory import RunDirectory

log = logging.getLogger(__name__)

_OUTCOME, _READERS = "run_directory/outcome", "run_directory/readers"
_FINISH_PATIENCE_SECONDS = 600.0
_ERROR_PATIENCE_SECONDS = 5.0


def claim_run_directory(loaded: LoadedConfig, launch: Launch, store: Store) -> tuple[RunDirectory, RunLock]:
    """Lock the run directory and read what earlier attempts left. All ranks must call it.

    Only rank 0 reads, after it holds the lock; the others are told by the store, so that no rank decides by a
    directory that changes. The lock is held until rank 0 ends; other ranks get one that does nothing.

    Raises:
        ConfigError: on all ranks: the directory is in use, belongs to another run, or cannot be written to.
    """
    if launch.rank != 0:
        store.wait([_OUTCOME], JOIN_PATIENCE)
        told = json.loads(store.get(_OUTCOME))
        store.add(_READERS, 1)
        if "problems" in told:
            raise ConfigError(Problem(**problem) for problem in told["problems"])
        return RunDirectory(Path(told.pop("path")), **told), RunLock()
    try:
        lock = RunLock.acquire(Path(loaded.config.run.output_dir).expanduser())
        directory = RunDirectory.examine(loaded)
    except ConfigError as error:
        _tell({"problems": [asdict(problem) for problem in error.problems]}, launch, store, _ERROR_PATIENCE_SECONDS)
        raise
    patience = _FINISH_PATIENCE_SECONDS if directory.is_finished(loaded) else 0.0
    _tell({**asdict(directory), "path": str(directory.path)}, launch, store, patience)
    return directory, lock


def _tell(outcome: dict[str, Any], launch: Launch, store: Store, patience: float) -> None:
    """Hand the outcome to the other ranks.

    Args:
        patience: seconds for which to wait until all have read it: this rank is about to end, and the store with it.
    """
    if launch.world == 1:
        return
    store.set(_OUTCOME, json.dumps(outcome))
    end, line = time.monotonic() + patience, time.monotonic() + 30
    while (readers := store.add(_READERS, 0)) < launch.world - 1 and time.monotonic() < end:
        if time.monotonic() > line:
            log.info("waiting for %d ranks to hear that the run has finished", launch.world - 1 - readers)
            line += 30
        time.sleep(0.05)
