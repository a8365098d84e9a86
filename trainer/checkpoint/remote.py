"""Copies of checkpoints in object stores, through fsspec. There is no rename there: the manifest, written last, is
what makes a copy complete."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec

from trainer.checkpoint.keep import LATEST
from trainer.errors import CheckpointError, ConfigError, Problem
from trainer.store import MANIFEST


def is_remote(place: str) -> bool:
    """Whether `place` is one of fsspec's, such as `s3://bucket/run`."""
    return "://" in place


class Remote:
    """A folder of checkpoints somewhere else."""

    def __init__(self, place: str, key: str = "checkpoint.upload") -> None:
        """Raises:
        ConfigError: if fsspec has no such file system, or its package is not installed.
        """
        try:
            self._files: Any
            self._files, self._root = fsspec.core.url_to_fs(place.rstrip("/"))
        except (ImportError, ValueError) as error:
            raise ConfigError(Problem(key, f"'{place}': {error}", "Install the package that fsspec names")) from None
        self.place = place

    def upload(self, folder: Path, names: Sequence[str]) -> None:
        """Copies files of a checkpoint. All but the manifest first, on all ranks; then the manifest, on one."""
        there = f"{self._root}/{folder.name}"
        self._files.makedirs(there, exist_ok=True)
        for name in names:
            self._files.put_file(str(folder / name), f"{there}/{name}")
        if MANIFEST in names:
            self._files.pipe_file(f"{self._root}/{LATEST}", f"{folder.name}\n".encode())

    def withdraw(self, name: str) -> None:
        """Makes a copy one that is not complete."""
        if self._files.exists(f"{self._root}/{name}/{MANIFEST}"):
            self._files.rm_file(f"{self._root}/{name}/{MANIFEST}")

    def delete(self, *names: str) -> None:
        """Deletes checkpoints, the manifest of each first."""
        for name in names:
            self.withdraw(name)
            if self._files.exists(f"{self._root}/{name}"):
                self._files.rm(f"{self._root}/{name}", recursive=True)

    def newest(self) -> str | None:
        """Name of the newest complete checkpoint; the place may also be that of a single one, whose name is "".

        Raises:
            CheckpointError: if the place cannot be asked.
        """
        try:
            self._files.invalidate_cache()
            if self._files.exists(f"{self._root}/{MANIFEST}"):
                return ""
            found = [path.rsplit("/", 2)[-2] for path in self._files.glob(f"{self._root}/step-*/{MANIFEST}")]
            order = [(*self._order(name), name) for name in found]
        except Exception as error:  # each store has its own
            raise CheckpointError(f"{self.place}: cannot be read: {error}") from None
        return max(order)[-1] if order else None

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
