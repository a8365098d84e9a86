"""Locking and examining the run directory at the start."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from trainer.config import LoadedConfig
from trainer.distributed import JOIN_TIMEOUT, Launch, Store, publish_value, receive_value
from trainer.errors import ConfigError, Problem
from trainer.fault_tolerance.run_lock import RunLock
from trainer.run_directory import RunDirectory

_OUTCOME = "run_directory"
_PURPOSE = "read the state of the run directory"
_FINISH_TIMEOUT = timedelta(minutes=10)
_ERROR_TIMEOUT = timedelta(seconds=5)


def claim_run_directory(loaded: LoadedConfig, launch: Launch, store: Store) -> tuple[RunDirectory, RunLock]:
    """Lock the run directory and read what earlier attempts left. Collective: all ranks must call it.

    Only rank 0 reads the directory, while it holds the lock, and publishes the result in the store, so that all ranks
    decide alike. Rank 0 holds the lock until it ends; the other ranks receive a lock that does nothing.

    Args:
        loaded: The configuration.
        launch: This process, as the launcher describes it.
        store: Store of all ranks.

    Raises:
        ConfigError: on all ranks: the directory is in use, belongs to another run, or is not writable.
    """
    if launch.rank != 0:
        value = receive_value(store, launch.rank, _OUTCOME, purpose="lock the run directory", timeout=JOIN_TIMEOUT)
        if value is None:
            raise ConfigError(Problem("run.output_dir", f"not locked by rank 0 within {JOIN_TIMEOUT}"))
        outcome = json.loads(value)
        if "problems" in outcome:
            raise ConfigError(Problem(**problem) for problem in outcome["problems"])
        return RunDirectory(Path(outcome.pop("path")), **outcome), RunLock()
    try:
        lock = RunLock.acquire(Path(loaded.config.run.output_dir).expanduser())
        directory = RunDirectory.examine(loaded)
    except ConfigError as error:
        problems = json.dumps({"problems": [asdict(problem) for problem in error.problems]})
        publish_value(store, launch.world_size, _OUTCOME, problems, purpose=_PURPOSE, timeout=_ERROR_TIMEOUT)
        raise
    outcome = json.dumps({**asdict(directory), "path": str(directory.path)})
    timeout = _FINISH_TIMEOUT if directory.is_finished(loaded) else timedelta()
    publish_value(store, launch.world_size, _OUTCOME, outcome, purpose=_PURPOSE, timeout=timeout)
    return directory, lock
