"""Copies of checkpoints in object stores, through fsspec. There is no rename there: the manifest, written last, is
what makes a copy complete."""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from trainer.checkpoint.retention import LATEST
from trainer.checkpoint_format import MANIFEST
from trainer.errors import CheckpointError, ConfigError, Problem

log = logging.getLogger(__name__)

T = TypeVar("T")

_TIMEOUT_SECONDS = 60.0
"""How long a place may take for a question that moves no data."""


def _with_timeout(seconds: float, work: Callable[[], T]) -> T:
    """The result of `work`, done in a thread that is abandoned when it takes longer.

    Raises:
        TimeoutError: it has not ended in time.
    """
    outcome: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((work(), None))
        except Exception as error:
            outcome.put((None, error))

    threading.Thread(target=run, name="remote", daemon=True).start()
    try:
        result, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:.0f} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def is_remote(place: str) -> bool:
    """Whether `place` is one of fsspec's, such as `s3://bucket/run`."""
    return "://" in place


class Remote:
    """A folder of checkpoints somewhere else."""

    def __init__(self, place: str, key: str = "checkpoint.upload") -> None:
        """Raises:
        ConfigError: if fsspec has no such file system, its package is not installed, or it cannot be reached.
        """
        self.place, self._key = place, key
        try:
            self._files: Any
            self._files, self._root = _with_timeout(_TIMEOUT_SECONDS, lambda: fsspec.core.url_to_fs(place.rstrip("/")))
        except (ImportError, ValueError) as error:
            raise ConfigError(Problem(key, f"'{place}': {error}", "Install the package that fsspec names")) from None
        except Exception as error:  # each store has its own
            raise self._unreachable(error) from None

    def _unreachable(self, error: Exception) -> ConfigError:
        reason = f"'{self.place}' cannot be reached: {type(error).__name__}: {error}"
        return ConfigError(Problem(self._key, reason, "Check the address, the credentials and the network"))

    def warn_if_unreachable(self) -> None:
        """Look once whether the place answers; a run that has its checkpoints here trains without it."""
        try:
            _with_timeout(_TIMEOUT_SECONDS, lambda: self._files.exists(self._root))
        except Exception as error:
            log.warning("%s. Checkpoints are kept here, and each save tries to copy again", self._unreachable(error))

    def upload(self, folder: Path, names: Sequence[str]) -> None:
        """Copies files of a checkpoint. All but the manifest first, on all ranks; then the manifest, on one."""
        there = f"{self._root}/{folder.name}"
        self._files.makedirs(there, exist_ok=True)
        for name in names:
            self._files.put_file(str(folder / name), f"{there}/{name}")
        if MANIFEST in names:
            self._files.pipe_file(f"{self._root}/{LATEST}", f"{folder.name}\n".encode())

    def invalidate(self, name: str) -> None:
        """Makes a copy one that is not complete."""

        def invalidate() -> None:
            if self._files.exists(f"{self._root}/{name}/{MANIFEST}"):
                self._files.rm_file(f"{self._root}/{name}/{MANIFEST}")

        _with_timeout(_TIMEOUT_SECONDS, invalidate)

    def delete_checkpoint(self, *names: str) -> None:
        """Deletes checkpoints, the manifest of each first."""
        for name in names:
            self.invalidate(name)
            if self._files.exists(f"{self._root}/{name}"):
                self._files.rm(f"{self._root}/{name}", recursive=True)

    def newest(self) -> str | None:
        """Name of the newest complete checkpoint; the place may also be that of a single one, whose name is "".

        Raises:
            ConfigError: the place cannot be asked.
        """

        def newest() -> str | None:
            self._files.invalidate_cache()
            if self._files.exists(f"{self._root}/{MANIFEST}"):
                return ""
            found = [path.rsplit("/", 2)[-2] for path in self._files.glob(f"{self._root}/step-*/{MANIFEST}")]
            return max(((*self._order(name), name) for name in found), default=(0, 0, None))[-1]

        try:
            return _with_timeout(_TIMEOUT_SECONDS, newest)
        except Exception as error:  # each store has its own
            raise self._unreachable(error) from None

    def _order(self, name: str) -> tuple[int, int]:
        body = json.loads(self._files.cat_file(f"{self._root}/{name}/{MANIFEST}"))
        return int(body["attempt"]), int(body["step"])

    def fetch(self, name: str, file: str, into: Path) -> None:
        """Copies a file of a checkpoint.

        Raises:
            CheckpointError: if it is not there.
        """
        there = f"{self._root}/{name}/{file}" if name else f"{self._root}/{file}"
        try:
            self._files.get_file(there, str(into))
        except Exception as error:
            raise CheckpointError(f"{self.place}: {there} cannot be copied: {error}") from None
