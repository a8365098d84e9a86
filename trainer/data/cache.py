"""Content-addressed cache of token files and tokenizers: built once, verified whenever they are opened.

One process per host builds and verifies before the process group exists; the other ranks of the host wait for a key in
the key-value store. No collective is involved, so building may take longer than the timeout of a collective.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock

from trainer.data.integrity import RECORD_FILE, find_damage, read_record, seal, update_mtimes
from trainer.distributed import JOIN_TIMEOUT, Launch, Store, wait_for_keys
from trainer.errors import ConfigError, DataError, Problem, RanksDifferError
from trainer.files import replace_text, sync_directory
from trainer.units import format_duration

log = logging.getLogger(__name__)

_PARTIAL = re.compile(r"\.(?P<entry>.+?)\.(?P<locked>locked-)?[0-9a-f]{8}\.partial")
_UNLOCKED_AGE_SECONDS = 24 * 3600.0
"""Age at which an unfinished directory of an earlier version, which held no lock, counts as abandoned."""

_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_SECONDS_BETWEEN_LINES = 30.0

Check = Callable[[Path], None]


@dataclass
class Cache:
    """A directory of entries, each of which is built once and then only read."""

    root: Path
    launch: Launch = field(default_factory=Launch)
    """Position of this process; local rank 0 builds and verifies the entries of its host."""

    store: Store | None = None
    """Shared by all ranks; None for a single process."""

    blocks: int | None = 64
    """Number of blocks per file to verify when an entry is opened; None for all."""

    def __post_init__(self) -> None:
        builder = self.launch.rank - self.launch.local_rank
        # All ranks count caches in the same order, so that a second cache of a process waits for separate keys.
        count = 0 if self.store is None else self.store.add(f"data/openings/{self.launch.rank}", 1)
        self._key = f"data/{builder}/{count}"
        self._entries = 0

    @property
    def is_builder(self) -> bool:
        """True on the one rank of each host that builds and verifies."""
        return self.launch.local_rank == 0

    def entry(
        self,
        signature: object,
        content: Callable[[], object],
        prefix: str,
        build: Callable[[Path], None],
        *,
        check: Check | None = None,
        adopt_unhashed: bool = False,
    ) -> Path:
        """Return the verified directory of an entry; build it if it is missing or damaged.

        All ranks of a host must call it with equal arguments and in the same order.

        Args:
            signature: JSON that is cheap to compute and maps, through an alias file, to the content hash of an earlier
                call, so that unchanged sources are not read again.
            content: returns JSON of everything that the result depends on.
            prefix: prefix of the directory name.
            build: writes the files of the entry to an empty directory.
            check: raises DataError if the files of an entry are inconsistent with each other.
            adopt_unhashed: hash an entry of an earlier version instead of rebuilding it.

        Raises:
            ConfigError: the cache cannot be written to, or the ranks of a host see different data.
        """
        digest = _digest(signature)
        key = f"{self._key}/{self._entries}"
        self._entries += 1
        if not self.is_builder:
            return self.root / self._wait_for_entry(key, digest)
        if self.store is not None:
            self.store.set(f"{key}/signature", digest)
        with self._refuse_full_disk():
            folder = _Entry(self, digest, check, adopt_unhashed).open(content, prefix, build)
        if self.store is not None:
            self.store.set(f"{key}/entry", folder.name)
        return folder

    def sweep(self) -> None:
        """Delete unfinished directories of killed builders; those of running ones are locked and stay."""
        for partial in self.root.glob(".*.partial") if self.is_builder else ():
            match = _PARTIAL.fullmatch(partial.name)
            if match is None:
                continue
            if not match["locked"]:
                if time.time() - _latest_mtime(partial) > _UNLOCKED_AGE_SECONDS:
                    shutil.rmtree(partial, ignore_errors=True)
                continue
            with contextlib.suppress(TimeoutError, OSError), FileLock(self.lock(match["entry"]), timeout=0):
                shutil.rmtree(partial, ignore_errors=True)

    def lock(self, name: str) -> str:
        """Return the path of the lock file of an entry or alias."""
        return str(self.root / f".{name}.lock")

    @contextlib.contextmanager
    def _refuse_full_disk(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not _is_disk_error(error, self.root):
                raise
            reason = getattr(error, "strerror", None) or error
            problem = f"'{self.root}' cannot be written to: {reason}"
            remedy = "Free space on its disk, or set data.cache_dir to another one"
            raise ConfigError(Problem("data.cache_dir", problem, remedy)) from None

    def _wait_for_entry(self, key: str, digest: str) -> str:
        builder = self.launch.rank - self.launch.local_rank
        if self._wait_for_key(f"{key}/signature", builder) != digest:
            reason = (
                f"rank {self.launch.rank} sees other files than rank {builder}, which prepares the data of this host "
                "(names, sizes, modification times, or data and model keys differ)"
            )
            remedy = "Start all ranks with the same configuration and working directory"
            raise RanksDifferError(Problem("data", reason, remedy))
        return self._wait_for_key(f"{key}/entry", builder)

    def _wait_for_key(self, key: str, builder: int) -> str:
        """Wait until the builder has set a key, and return its value."""
        if self.store is None:
            raise ValueError("a rank that is not the builder needs a store")
        if wait_for_keys(self.store, {key: f"rank {builder}"}, "prepare the data of this host", JOIN_TIMEOUT):
            raise DataError(f"{self.root}: rank {builder} has not prepared the data in {JOIN_TIMEOUT}")
        return str(self.store.get(key).decode())


class NotCachedError(Exception):
    """The entry is missing, so it would have to be built."""


class CacheView(Cache):
    """Read-only view of a cache: finds entries without building or verifying any."""

    def entry(
        self,
        signature: object,
        content: Callable[[], object],
        prefix: str,
        build: Callable[[Path], None],
        *,
        check: Check | None = None,
        adopt_unhashed: bool = False,
    ) -> Path:
        """Return the directory of an entry. See `Cache.entry`.

        Raises:
            NotCachedError: it is missing.
        """
        folder = _Entry(self, _digest(signature), check, adopt_unhashed).resolve_alias()
        if folder is None or not (folder / RECORD_FILE).is_file():
            raise NotCachedError
        return folder


class _Entry:
    """One call of `Cache.entry` in the builder."""

    def __init__(self, cache: Cache, digest: str, check: Check | None, adopt_unhashed: bool) -> None:
        self._cache, self._check, self._adopts = cache, check, adopt_unhashed
        self._alias = cache.root / "aliases" / f"{digest}.json"
        self._blocks = cache.blocks
        self._last_damage = ""

    def open(self, content: Callable[[], object], prefix: str, build: Callable[[Path], None]) -> Path:
        """Return the directory of the entry, built if necessary. See `Cache.entry`."""
        if (folder := self.resolve_alias()) is not None and self._is_valid(folder):
            return folder
        root = self._cache.root
        self._alias.parent.mkdir(parents=True, exist_ok=True)
        with _hold_lock(self._cache.lock(self._alias.stem[:32])):
            if (other := self.resolve_alias()) is not None and other != folder and self._is_valid(other):
                return other  # another run has built it while this process waited for the lock
            name = f"{prefix}-{_digest(content())[:32]}"
            with _hold_lock(self._cache.lock(name)):
                if not self._is_valid(root / name, locked=True):
                    if self._last_damage:
                        log.warning("rebuilding cache entry %s: %s", root / name, self._last_damage)
                    self._build(root / name, build)
            replace_text(self._alias, json.dumps({"name": name}))
        return root / name

    def resolve_alias(self) -> Path | None:
        """Return the directory that an earlier call recorded for this signature."""
        try:
            name = json.loads(self._alias.read_text())["name"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None
        return self._cache.root / name if isinstance(name, str) and "/" not in name else None

    def _is_valid(self, folder: Path, *, locked: bool = False) -> bool:
        if not (folder / RECORD_FILE).is_file():
            return False
        try:
            damage = self._verify(folder, locked)
            if damage is None and self._check is not None:
                self._check(folder)
        except (DataError, ValueError) as error:
            damage = str(error)
        if damage is not None:
            self._last_damage, self._blocks = damage, None  # a second verification must find it again
            return False
        with contextlib.suppress(TimeoutError, OSError), FileLock(self._cache.lock(folder.name), timeout=0):
            update_mtimes(folder)
        return True

    def _verify(self, folder: Path, locked: bool) -> str | None:
        if read_record(folder) is None:
            if not (self._adopts and locked and self._cache.blocks is not None):
                return "an earlier version wrote it, without hashes"
            seal(folder)
        return find_damage(folder, blocks=self._blocks)

    def _build(self, folder: Path, build: Callable[[Path], None]) -> None:
        partial = self._temporary_path(folder)
        partial.mkdir()
        try:
            build(partial)
            seal(partial)
            if folder.exists():
                os.replace(folder, old := self._temporary_path(folder))
                os.replace(partial, folder)
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(partial, folder)
            sync_directory(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @staticmethod
    def _temporary_path(folder: Path) -> Path:
        return folder.with_name(f".{folder.name}.locked-{uuid.uuid4().hex[:8]}.partial")


@contextlib.contextmanager
def _hold_lock(path: str) -> Iterator[None]:
    """Hold a file lock; log while another process holds it."""
    lock, start = FileLock(path), time.monotonic()
    while True:
        try:
            lock.acquire(timeout=_SECONDS_BETWEEN_LINES)
            break
        except TimeoutError:
            waited = format_duration(time.monotonic() - start)
            log.info("waiting for another process that prepares the same data (%s, it holds %s)", waited, path)
    try:
        yield
    finally:
        lock.release()


def _is_disk_error(error: Exception, root: Path) -> bool:
    """Return whether an error comes from writing the cache.

    The tokenizers library, written in Rust, raises a bare Exception that has the error number in its text.
    """
    if isinstance(error, OSError):
        is_in_cache = error.filename is not None and str(error.filename).startswith(str(root))
        return is_in_cache or error.errno in _DISK_ERRNOS
    return any(f"(os error {number})" in str(error) for number in _DISK_ERRNOS)


def _latest_mtime(folder: Path) -> float:
    times = []
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times, default=time.time())


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
