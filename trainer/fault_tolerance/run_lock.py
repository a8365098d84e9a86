"""The lock of a run directory: of all starts, at most one writes to it.

`RUN/.lock` is locked by `flock` and names its holder. The kernel releases it when the holder ends, however it ends.
Where the file system has no `flock`, or may have it for one host only, the holder touches the file every 10 s, and
whoever has not touched it for 60 s holds it no longer. Only what writes to a run directory takes the lock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from trainer.errors import ConfigError, Problem
from trainer.run_layout import LOCK

log = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
PATIENCE_SECONDS = 60.0
"""How long a start waits for a holder that is about to end."""

_POLL_SECONDS = 0.25
_SETTLE_SECONDS = 2.0
"""Without `flock`, of two starts that write at the same time the later one holds the lock, after so long."""

_NO_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_SHARED_BY_HOSTS = ("nfs", "nfs4", "cifs", "smb3", "lustre", "beegfs", "ceph", "gpfs", "glusterfs", "fuse.glusterfs")
"""Types of file systems on which `flock` may hold on one host only, as they are mounted."""

_CONTENT_BYTES = 512

State = Literal["running", "stopping"]


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, as its file says."""

    host: str
    pid: int
    started: int
    """Start time of the process in clock ticks since boot: field 22 of /proc/PID/stat."""

    machine: str
    """Boot and process namespace in which `pid` has a meaning."""

    since: str
    """UTC, ISO 8601."""

    state: State = "running"

    @property
    def is_local(self) -> bool:
        """Whether this process can look for it."""
        return self.machine == _machine()

    @property
    def is_alive(self) -> bool:
        """Whether it still runs, if it is local."""
        return _start_time(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _start_time(pid: int) -> int | None:
    """See `Holder.started`; None if there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _this_process() -> Holder:
    since = datetime.now(UTC).isoformat(sep=" ", timespec="seconds").replace("+00:00", " UTC")
    return Holder(socket.gethostname(), os.getpid(), _start_time(os.getpid()) or 0, _machine(), since)


class RunLock:
    """The lock of a run directory, held by this process until `release` or its end. See `RunLock.acquire`."""

    def __init__(self, path: Path | None = None, descriptor: int = -1, holder: Holder | None = None) -> None:
        """Without arguments: what the ranks have that do not hold the lock. All of its methods do nothing."""
        self._path, self._descriptor, self._holder = path, descriptor, holder
        self._beats: threading.Event | None = None
        if descriptor >= 0:
            os.register_at_fork(after_in_child=self._leave_to_parent)

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
            attempt = _Attempt(path, descriptor)
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

    def stopping(self) -> None:
        """Tell other starts that this run is saving and about to end, so that they wait for it."""
        if self._holder is not None:
            self._holder = replace(self._holder, state="stopping")
            try:
                _write(self._descriptor, self._holder)
            except OSError as error:
                log.warning("%s: not written: %s", self._path, error)

    def release(self) -> None:
        """Let others have the directory before this process ends. Nothing may be written to it afterwards."""
        if self._holder is None:
            return
        if self._beats is not None:
            self._beats.set()
        try:
            os.ftruncate(self._descriptor, 0)
        except OSError as error:
            log.warning("%s: not emptied: %s", self._path, error)
        os.close(self._descriptor)
        self._descriptor, self._holder = -1, None

    def _leave_to_parent(self) -> None:
        """A forked child must not keep the lock when this process ends."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._holder = -1, None

    def _start_heartbeat(self) -> None:
        self._beats = threading.Event()
        threading.Thread(target=self._beat, args=(self._beats,), name="run lock", daemon=True).start()

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(BEAT_SECONDS):
            try:
                found = _read(self._descriptor)
                if found is not None and self._holder is not None and not _is_same(found, self._holder):
                    log.error("%s was taken over by %s, because this process had not touched it for %d s. Ending: two "
                              "runs must not write to one directory", self._path, found, STALE_SECONDS)  # fmt: skip
                    os._exit(ConfigError.exit_status)
                os.utime(self._descriptor)
            except OSError as error:
                log.warning("%s: not touched: %s", self._path, error)


class _Attempt:
    """The way to the lock of one start."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor
        self._seen: tuple[int, float] | None = None
        """The other host's last heartbeat (its time in the file system) and the age that it has here at least."""

        self.holder = _this_process()
        self.needs_heartbeat = False

    def wait(self) -> None:
        """Return when the lock is this process's.

        Raises:
            ConfigError: it is another one's. OSError: the file cannot be read or written.
        """
        end, told = time.monotonic() + PATIENCE_SECONDS, False
        while True:
            other, ends_soon = self._try()
            if other is None and not ends_soon:
                return
            if not ends_soon or time.monotonic() > end:
                raise _in_use(self._path, other)
            if not told and other is not None:
                log.info("waiting up to %d s for %s, which holds %s and %s", PATIENCE_SECONDS, other, self._path,
                         "is stopping" if other.state == "stopping" else "may have died")  # fmt: skip
                told = True
            time.sleep(_POLL_SECONDS)

    def _try(self) -> tuple[Holder | None, bool]:
        """Who else holds the lock, and whether it is worth waiting; (None, False) if this process holds it now."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return self._holding()
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            self.needs_heartbeat = True
        else:
            self.needs_heartbeat = _file_system_of(self._path) in _SHARED_BY_HOSTS
        if self.needs_heartbeat:
            other, ends_soon = self._beating()
            if other is not None:
                return other, ends_soon
        _write(self._descriptor, self.holder)
        if self.needs_heartbeat:
            time.sleep(_SETTLE_SECONDS)
            found = _read(self._descriptor)
            if found is not None and not _is_same(found, self.holder):
                return found, False
        return None, False

    def _holding(self) -> tuple[Holder | None, bool]:
        other = _read(self._descriptor)
        if other is None or (other.is_local and not other.is_alive):  # the holder has not written its name yet
            return None, True
        return other, other.state == "stopping"

    def _beating(self) -> tuple[Holder | None, bool]:
        """The holder by its heartbeat; (None, False) if none lives."""
        other = _read(self._descriptor)
        if other is None or _is_same(other, self.holder):
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


def _is_same(one: Holder, other: Holder) -> bool:
    return (one.machine, one.pid, one.started) == (other.machine, other.pid, other.started)


def _write(descriptor: int, holder: Holder) -> None:
    """In place and in one call, so that no reader finds a part."""
    text = json.dumps(asdict(holder)).encode()
    os.pwrite(descriptor, text.ljust(_CONTENT_BYTES - 1) + b"\n", 0)
    os.ftruncate(descriptor, max(_CONTENT_BYTES, len(text) + 1))
    os.fsync(descriptor)


def _read(descriptor: int) -> Holder | None:
    """None where nobody has written, or somebody else has."""
    try:
        return Holder(**json.loads(os.pread(descriptor, 4 * _CONTENT_BYTES, 0)))
    except (ValueError, TypeError, RecursionError):
        return None


def _age_seconds(path: Path, beat: int) -> float:
    """Seconds since a time of the file system, by the file system's own clock."""
    probe = path.with_name(f"{LOCK}.{socket.gethostname()}.{os.getpid()}")
    try:
        probe.touch()
        return (probe.stat().st_mtime_ns - beat) / 1e9
    finally:
        probe.unlink(missing_ok=True)


def _file_system_of(path: Path) -> str:
    """The type of the file system that holds `path`, as it is mounted."""
    target, longest, found = os.path.realpath(path), -1, ""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        before, _, after = line.partition(" - ")
        mounted = before.split()[4].encode().decode("unicode_escape")
        if len(mounted) >= longest and os.path.commonpath([mounted, target]) == mounted:
            longest, found = len(mounted), after.split()[0]
    return found
