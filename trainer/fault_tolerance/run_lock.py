"""The lock of a run directory: at most one run writes to it.

`RUN/.lock` is locked with `flock` and names its holder; the kernel releases it when the holder ends, however it ends.
On file systems without `flock`, or where `flock` may not work across hosts, the holder also updates the file's time
every 10 s (heartbeat) and loses the lock after 60 s without. Commands that only read do not take the lock.
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
"""Maximum wait for a holder that is about to end."""

_POLL_SECONDS = 0.25
_SETTLE_SECONDS = 2.0
"""Without `flock`, the last of two simultaneous writers holds the lock after this time."""

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
"""Types of mounted file systems on which `flock` may work within one host only."""


class RunLock:
    """Lock of a run directory, held by this process until `release` or its end. See `RunLock.acquire`."""

    def __init__(self, path: Path | None = None, descriptor: int = -1, holder: Holder | None = None) -> None:
        """Make a lock of an open file; without arguments, the inert lock of other ranks, whose methods do nothing."""
        self._path, self._descriptor, self._holder = path, descriptor, holder
        self._heartbeat_stop: threading.Event | None = None
        self._mutex = threading.Lock()
        """Held while the descriptor is used or closed: a closed descriptor's number may be reused."""

        if descriptor >= 0:
            os.register_at_fork(after_in_child=self._close_in_child)

    @classmethod
    def acquire(cls, run: Path) -> RunLock:
        """Lock the run directory `run`, which is created if necessary. Rank 0 only.

        Waits up to a minute, after a log line, if the holder is about to end: it is stopping, or runs on another host
        and may have died.

        Raises:
            ConfigError: another process holds the lock, or the lock file is not writable.
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
        """Show other starts that this run is saving and about to end, so that they wait for it."""
        with self._mutex:
            if self._holder is None:
                return
            self._holder = replace(self._holder, state="stopping")
            try:
                write_holder(self._descriptor, self._holder)
            except OSError as error:
                log.warning("cannot write %s: %s", self._path, error)

    def release(self) -> None:
        """Release the lock before this process ends. The process must not write to the directory afterwards."""
        with self._mutex:
            if self._holder is None:
                return
            if self._heartbeat_stop is not None:
                self._heartbeat_stop.set()
            try:
                os.ftruncate(self._descriptor, 0)
            except OSError as error:
                log.warning("cannot truncate %s: %s", self._path, error)
            os.close(self._descriptor)
            self._descriptor, self._holder = -1, None

    def _close_in_child(self) -> None:
        """Close the file in a forked child, which would keep the lock after the end of this process."""
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
                    "exiting: %s was taken over by %s after %d s without a heartbeat of this process, and two runs "
                    "must not write to one directory",
                    self._path,
                    current_holder,
                    STALE_SECONDS,
                )
                os._exit(ConfigError.exit_status)
            os.utime(self._descriptor)
        except OSError as error:
            log.warning("cannot update the heartbeat of %s: %s", self._path, error)


class _LockAttempt:
    """The attempt of one start to acquire the lock."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor
        self._seen: tuple[int, float] | None = None
        """Last heartbeat of another host, as file time, and the latest local time at which it can have been."""

        self.holder = current_process()
        self.needs_heartbeat = False

    def wait(self) -> None:
        """Wait until this process holds the lock.

        Raises:
            ConfigError: another process holds it.
            OSError: the file cannot be read or written.
        """
        deadline, has_logged = time.monotonic() + WAIT_SECONDS, False
        while True:
            other, ends_soon = self._try_acquire()
            if other is None and not ends_soon:
                return
            if not ends_soon or time.monotonic() > deadline:
                raise _in_use(self._path, other)
            if not has_logged and other is not None:
                condition = "is stopping" if other.state == "stopping" else "may have died"
                log.info("waiting up to %d s for %s, which holds %s and %s", WAIT_SECONDS, other, self._path, condition)
                has_logged = True
            time.sleep(_POLL_SECONDS)

    def _try_acquire(self) -> tuple[Holder | None, bool]:
        """Try to acquire the lock.

        Returns:
            The other holder, and True if it is about to end; (None, False) if this process holds the lock now.
        """
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
        if other is None or (other.is_local and not other.is_alive):  # the holder has not written its record yet
            return None, True
        return other, other.state == "stopping"

    def _holder_by_heartbeat(self) -> tuple[Holder | None, bool]:
        """Return the live holder by its heartbeat, as `_try_acquire` does."""
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
    reason = f"{path.parent} is in use by {who}{state}: a run is writing to it"
    return ConfigError(Problem("run.output_dir", reason, "Wait for its end, stop it, or use another directory"))


def _unwritable(path: Path, error: OSError) -> ConfigError:
    reason = f"cannot write {path}: {error.strerror or error}"
    return ConfigError(Problem("run.output_dir", reason, "Use another directory, or change its permissions"))


def _age_seconds(path: Path, beat: int) -> float:
    """Return the age of a file time in seconds, by the clock of the file system."""
    probe = path.with_name(f"{LOCK}.{socket.gethostname()}.{os.getpid()}")
    try:
        probe.touch()
        return (probe.stat().st_mtime_ns - beat) / 1e9
    finally:
        probe.unlink(missing_ok=True)


def _file_system_type(path: Path) -> str:
    """Return the type of the mounted file system that contains `path`."""
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
