"""A start takes a run directory: rank 0 locks and examines it, and all ranks decide alike."""

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
_PURPOSE = "hear what is in the run directory"
_FINISH_TIMEOUT = timedelta(minutes=10)
_ERROR_TIMEOUT = timedelta(seconds=5)


def claim_run_directory(loaded: LoadedConfig, launch: Launch, store: Store) -> tuple[RunDirectory, RunLock]:
    """Lock the run directory and read what earlier attempts left. All ranks must call it.

    Only rank 0 reads, after it holds the lock; the others are told by the store, so that no rank decides by a
    directory that changes. The lock is held until rank 0 ends; other ranks get one that does nothing.

    Raises:
        ConfigError: on all ranks: the directory is in use, belongs to another run, or cannot be written to.
    """
    if launch.rank != 0:
        value = receive_value(store, launch.rank, _OUTCOME, "lock the run directory", JOIN_TIMEOUT)
        if value is None:
            raise ConfigError(Problem("run.output_dir", f"rank 0 did not lock it within {JOIN_TIMEOUT}"))
        outcome = json.loads(value)
        if "problems" in outcome:
            raise ConfigError(Problem(**problem) for problem in outcome["problems"])
        return RunDirectory(Path(outcome.pop("path")), **outcome), RunLock()
    try:
        lock = RunLock.acquire(Path(loaded.config.run.output_dir).expanduser())
        directory = RunDirectory.examine(loaded)
    except ConfigError as error:
        problems = json.dumps({"problems": [asdict(problem) for problem in error.problems]})
        publish_value(store, launch.world_size, _OUTCOME, problems, _PURPOSE, _ERROR_TIMEOUT)
        raise
    outcome = json.dumps({**asdict(directory), "path": str(directory.path)})
    is_finished = directory.is_finished(loaded)
    publish_value(
        store, launch.world_size, _OUTCOME, outcome, _PURPOSE, _FINISH_TIMEOUT if is_finished else timedelta()
    )
    return directory, lock
