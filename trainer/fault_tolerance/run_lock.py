"""The lock of a run directory: of all starts, at most one writes to it.

`RUN/.lock` is locked by `flock` and names its holder. The kernel releases it when the holder ends, however it ends.
Where the file system has no `flock`, or may have it for one host only, the holder touches the file every 10 s, and
whoever has not touched it for 60 s holds it no longer. Only what writes to a run directory takes the lock.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

from trainer.errors import ConfigError, Problem
from trainer.fault_tolerance.lock_holder import Holder, current_process, is_same_process, read_holder, write_holder
from trainer.run_layout import LOCK

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
WAIT_SECONDS = 60.0
"""How long a start waits for a holder that is about to end."""

_POLL_SECONDS = 0.25
_SETTLE_SECONDS = 2.0
"""Without `flock`, of two starts that write at the same time the later one holds the lock, after so long."""

_FLOCK_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_NETWORK_FILE_SYSTEMS = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "lustre",
    "beegfs",
    "ceph",
    "gpfs",
    "glusterfs",
    "fuse.glusterfs",
)
"""Types of file systems on which `flock` may hold on one host only, as they are mounted."""


class RunLock:
    """The lock of a run directory, held by this process until `release` or its end. See `RunLock.acquire`."""

    def __init__(self, path: Path | None = None, descriptor: int = -1, holder: Holder | None = None) -> None:
        """Without arguments: what the ranks have that do not hold the lock. All of its methods do nothing."""
        self._path, self._descriptor, self._holder = path, descriptor, holder
        self._heartbeat_stop: threading.Event | None = None
        self._mutex = threading.Lock()
        """Held while the descriptor is used or closed: its number may be another file's afterwards."""

        if descriptor >= 0:
            os.register_at_fork(after_in_child=self._close_in_child)

    @classmethod
    def acquire(cls, run: Path) -> RunLock:
        """Lock the run directory `run`, which is made if it is absent. Call on rank 0 only.

        Waits for up to a minute, with a line, where the holder is about to end: it says that it is stopping, or runs
        on another host and may have died.

        Raises:
            ConfigError: another process holds the lock, or the lock cannot be written.
        """
        path = run / LOCK
        try:
            run.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise _unwritable(path, error) from None
        try:
            attempt = _LockAttempt(path, descriptor)
            attempt.wait()
            lock = cls(path, descriptor, attempt.holder)
            if attempt.needs_heartbeat:
                lock._start_heartbeat()
        except OSError as error:
            os.close(descriptor)
            raise _unwritable(path, error) from None
        except ConfigError:
            os.close(descriptor)
            raise
        return lock

    def mark_stopping(self) -> None:
        """Tell other starts that this run is saving and about to end, so that they wait for it."""
        with self._mutex:
            if self._holder is None:
                return
            self._holder = replace(self._holder, state="stopping")
            try:
                write_holder(self._descriptor, self._holder)
            except OSError as error:
                log.warning("%s: not written: %s", self._path, error)

    def release(self) -> None:
        """Let others have the directory before this process ends. Nothing may be written to it afterwards."""
        with self._mutex:
            if self._holder is None:
                return
            if self._heartbeat_stop is not None:
                self._heartbeat_stop.set()
            try:
                os.ftruncate(self._descriptor, 0)
            except OSError as error:
                log.warning("%s: not emptied: %s", self._path, error)
            os.close(self._descriptor)
            self._descriptor, self._holder = -1, None

    def _close_in_child(self) -> None:
        """A forked child must not keep the lock when this process ends."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._holder = -1, None

    def _start_heartbeat(self) -> None:
        self._heartbeat_stop = threading.Event()
        threading.Thread(target=self._run_heartbeat, args=(self._heartbeat_stop,), name="run lock", daemon=True).start()

    def _run_heartbeat(self, ended: threading.Event) -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            with self._mutex:
                if self._holder is not None:
                    self._touch(self._holder)

    def _touch(self, holder: Holder) -> None:
        try:
            current_holder = read_holder(self._descriptor)
            if current_holder is not None and not is_same_process(current_holder, holder):
                log.error(
                    "%s was taken over by %s, because this process had not touched it for %d s. Ending: two "
                    "runs must not write to one directory",
                    self._path,
                    current_holder,
                    STALE_SECONDS,
                )
                os._exit(ConfigError.exit_status)
            os.utime(self._descriptor)
        except OSError as error:
            log.warning("%s: not touched: %s", self._path, error)


class _LockAttempt:
    """The way to the lock of one start."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor
        self._seen: tuple[int, float] | None = None
        """The other host's last heartbeat (its time in the file system) and the age that it has here at least."""

        self.holder = current_process()
        self.needs_heartbeat = False

    def wait(self) -> None:
        """Return when the lock is this process's.

        Raises:
            ConfigError: it is another one's. OSError: the file cannot be read or written.
        """
        deadline, has_logged = time.monotonic() + WAIT_SECONDS, False
        while True:
            other, ends_soon = self._try_acquire()
            if other is None and not ends_soon:
                return
            if not ends_soon or time.monotonic() > deadline:
                raise _in_use(self._path, other)
            if not has_logged and other is not None:
                log.info("waiting up to %d s for %s, which holds %s and %s", WAIT_SECONDS, other, self._path,
                         "is stopping" if other.state == "stopping" else "may have died")  # fmt: skip
                has_logged = True
            time.sleep(_POLL_SECONDS)

    def _try_acquire(self) -> tuple[Holder | None, bool]:
        """Who else holds the lock, and whether it is worth waiting; (None, False) if this process holds it now."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return self._holder_by_flock()
        except OSError as error:
            if error.errno not in _FLOCK_UNSUPPORTED:
                raise
            self.needs_heartbeat = True
        else:
            self.needs_heartbeat = _file_system_type(self._path) in _NETWORK_FILE_SYSTEMS
        if self.needs_heartbeat:
            other, ends_soon = self._holder_by_heartbeat()
            if other is not None:
                return other, ends_soon
        write_holder(self._descriptor, self.holder)
        if self.needs_heartbeat:
            time.sleep(_SETTLE_SECONDS)
            current_holder = read_holder(self._descriptor)
            if current_holder is not None and not is_same_process(current_holder, self.holder):
                return current_holder, False
        return None, False

    def _holder_by_flock(self) -> tuple[Holder | None, bool]:
        other = read_holder(self._descriptor)
        if other is None or (other.is_local and not other.is_alive):  # the holder has not written its name yet
            return None, True
        return other, other.state == "stopping"

    def _holder_by_heartbeat(self) -> tuple[Holder | None, bool]:
        """The holder by its heartbeat; (None, False) if none lives."""
        other = read_holder(self._descriptor)
        if other is None or is_same_process(other, self.holder):
            return None, False
        if other.is_local:
            return (other, other.state == "stopping") if other.is_alive else (None, False)
        beat, now = os.fstat(self._descriptor).st_mtime_ns, time.monotonic()
        if self._seen is None:
            self._seen = beat, now - _age_seconds(self._path, beat)
        if self._seen[0] != beat and other.state != "stopping":
            return other, False
        if self._seen[0] != beat:
            self._seen = beat, now
        return (None, False) if now - self._seen[1] > STALE_SECONDS else (other, True)


def _in_use(path: Path, holder: Holder | None) -> ConfigError:
    who = "another process" if holder is None else str(holder)
    state = ", which is stopping," if holder is not None and holder.state == "stopping" else ""
    return ConfigError(
        Problem("run.output_dir", f"{path.parent} is in use by {who}{state}: a run is writing to it",
                "Wait for its end, stop it, or take another folder")
    )  # fmt: skip


def _unwritable(path: Path, error: OSError) -> ConfigError:
    reason = f"{path} cannot be written: {error.strerror or error}"
    return ConfigError(Problem("run.output_dir", reason, "Take another folder, or its permissions"))


def _age_seconds(path: Path, beat: int) -> float:
    """Seconds since a time of the file system, by the file system's own clock."""
    probe = path.with_name(f"{LOCK}.{socket.gethostname()}.{os.getpid()}")
    try:
        probe.touch()
        return (probe.stat().st_mtime_ns - beat) / 1e9
    finally:
        probe.unlink(missing_ok=True)


def _file_system_type(path: Path) -> str:
    """The type of the file system that holds `path`, as it is mounted."""
    target, longest, current_holder = os.path.realpath(path), -1, ""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        before, _, after = line.partition(" - ")
        mounted = before.split()[4].encode().decode("unicode_escape")
        if len(mounted) >= longest and os.path.commonpath([mounted, target]) == mounted:
            longest, current_holder = len(mounted), after.split()[0]
    return current_holder
