"""Copies of checkpoints in object stores, through fsspec.

Object stores have no rename: the manifest, which is written last, makes a copy complete.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import fsspec

from trainer.checkpoint.saved import CHECKPOINT_GLOB, LATEST
from trainer.checkpoint_format import MANIFEST
from trainer.errors import CheckpointError, ConfigError, Problem

log = logging.getLogger(__name__)

T = TypeVar("T")

_TIMEOUT_SECONDS = 60.0
"""Timeout of a request that transfers no data."""


class _FileSystem(Protocol):
    """The methods of `fsspec.AbstractFileSystem`, which is untyped, that are used here."""

    def exists(self, path: str) -> bool: ...
    def makedirs(self, path: str, exist_ok: bool) -> None: ...
    def put_file(self, lpath: str, rpath: str) -> None: ...
    def get_file(self, rpath: str, lpath: str) -> None: ...
    def pipe_file(self, path: str, value: bytes) -> None: ...
    def cat_file(self, path: str) -> bytes: ...
    def rm_file(self, path: str) -> None: ...
    def rm(self, path: str, recursive: bool) -> None: ...
    def glob(self, path: str) -> Iterable[str]: ...
    def invalidate_cache(self) -> None: ...


def is_object_store_url(path: str) -> bool:
    """Return True for an address of fsspec, such as `s3://bucket/run`."""
    return "://" in path


class ObjectStore:
    """A folder of checkpoints in an object store."""

    def __init__(self, url: str, key: str, files: _FileSystem, root: str) -> None:
        """Use an open file system; see `connect`.

        Args:
            url: Address of the folder.
            key: Configuration key that holds the address, for messages.
            files: The file system of the address.
            root: Path of the folder in this file system.
        """
        self.url, self._key, self._files, self._root = url, key, files, root

    @classmethod
    def connect(cls, url: str, key: str = "checkpoint.upload") -> ObjectStore:
        """Open the file system of an address, such as `s3://bucket/run`.

        Raises:
            ConfigError: fsspec has no such file system, its package is not installed, or it cannot be reached.
        """
        try:
            files, root = _with_timeout(lambda: fsspec.core.url_to_fs(url.rstrip("/")))
        except (ImportError, ValueError) as error:
            raise ConfigError(Problem(key, f"'{url}': {error}", "Install the package that fsspec names")) from None
        except Exception as error:  # every store has its own exceptions
            raise _unreachable(url, key, error) from None
        return cls(url, key, files, root)

    def warn_if_unreachable(self) -> None:
        """Log a warning if the store does not respond: a run that has its checkpoints locally trains without it."""
        try:
            _with_timeout(lambda: self._files.exists(self._root))
        except Exception as error:
            problem = _unreachable(self.url, self._key, error)
            log.warning("%s. Checkpoints are kept locally, and each save retries the upload", problem)

    def upload(self, folder: Path, names: Sequence[str]) -> None:
        """Copy files of a checkpoint: on all ranks all but the manifest; then on one rank the manifest."""
        target = f"{self._root}/{folder.name}"
        self._files.makedirs(target, exist_ok=True)
        for name in names:
            self._files.put_file(str(folder / name), f"{target}/{name}")
        if MANIFEST in names:
            self._files.pipe_file(f"{self._root}/{LATEST}", f"{folder.name}\n".encode())

    def invalidate(self, name: str) -> None:
        """Make a copy incomplete by removing its manifest."""
        manifest = f"{self._root}/{name}/{MANIFEST}"

        def remove_manifest() -> None:
            if self._files.exists(manifest):
                self._files.rm_file(manifest)

        _with_timeout(remove_manifest)

    def delete(self, *names: str) -> None:
        """Delete copies, the manifest of each first."""
        for name in names:
            self.invalidate(name)
            if self._files.exists(f"{self._root}/{name}"):
                self._files.rm(f"{self._root}/{name}", recursive=True)

    def newest(self) -> str | None:
        """Return the name of the newest complete copy, or None; "" if the address is that of a single checkpoint.

        Raises:
            ConfigError: the store cannot be reached.
        """
        try:
            return _with_timeout(self._newest)
        except Exception as error:  # every store has its own exceptions
            raise _unreachable(self.url, self._key, error) from None

    def fetch(self, name: str, file: str, target: Path) -> None:
        """Copy a file of a checkpoint to `target`.

        Raises:
            CheckpointError: the file does not exist, or cannot be copied.
        """
        source = f"{self._root}/{name}/{file}" if name else f"{self._root}/{file}"
        try:
            self._files.get_file(source, str(target))
        except Exception as error:
            raise CheckpointError(f"{self.url}: {source} cannot be copied: {error}") from None

    def _newest(self) -> str | None:
        self._files.invalidate_cache()
        if self._files.exists(f"{self._root}/{MANIFEST}"):
            return ""
        names = [path.rsplit("/", 2)[-2] for path in self._files.glob(f"{self._root}/{CHECKPOINT_GLOB}/{MANIFEST}")]
        return max(names, key=self._order, default=None)

    def _order(self, name: str) -> tuple[int, int, str]:
        body = json.loads(self._files.cat_file(f"{self._root}/{name}/{MANIFEST}"))
        return int(body["attempt"]), int(body["step"]), name


def _unreachable(url: str, key: str, error: Exception) -> ConfigError:
    reason = f"'{url}' cannot be reached: {type(error).__name__}: {error}"
    return ConfigError(Problem(key, reason, "Check the address, the credentials and the network"))


def _with_timeout(work: Callable[[], T]) -> T:
    """Return the result of `work`, run in a thread that is abandoned after `_TIMEOUT_SECONDS`.

    Raises:
        TimeoutError: the work takes longer.
    """
    results: queue.SimpleQueue[T] = queue.SimpleQueue()
    errors: list[Exception] = []
    is_done = threading.Event()

    def run() -> None:
        try:
            results.put(work())
        except Exception as error:
            errors.append(error)
        is_done.set()

    threading.Thread(target=run, name="object-store", daemon=True).start()
    if not is_done.wait(_TIMEOUT_SECONDS):
        raise TimeoutError(f"no response within {_TIMEOUT_SECONDS:.0f} s")
    if errors:
        raise errors[0]
    return results.get()
