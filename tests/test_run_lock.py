"""The lock of a run directory: a second start exits with 2 and names the first, or waits for its end."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from launch.train import train
from tests.commands import ROOT, TRAIN, read_rows
from tests.configs import with_values
from tests.harness import captured_messages, context, deepspeed_command, run_command, run_ranks
from trainer.checkpoint import CheckpointSaver
from trainer.checkpoint_format import read_manifest, verify_files
from trainer.config.load import check_config
from trainer.distributed import Launch
from trainer.errors import ConfigError, Preempted
from trainer.fault_tolerance import StopRequests, run_lock
from trainer.fault_tolerance.lock_holder import Holder, current_process
from trainer.fault_tolerance.processes import process_stat
from trainer.fault_tolerance.run_lock import RunLock
from trainer.run_layout import LOCK


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (
        ("HEARTBEAT_SECONDS", 0.1),
        ("STALE_SECONDS", 0.8),
        ("WAIT_SECONDS", 1.5),
        ("_POLL_SECONDS", 0.02),
        ("_SETTLE_SECONDS", 0.1),
    ):
        monkeypatch.setattr(run_lock, name, seconds)


@pytest.fixture
def locks() -> Iterator[Callable[[Path], RunLock]]:
    """Acquire locks that are released after the test."""
    held: list[RunLock] = []

    def acquire(run: Path) -> RunLock:
        held.append(RunLock.acquire(run))
        return held[-1]

    yield acquire
    for lock in held:
        lock.release()


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def write_remote_holder(run: Path, **values: Any) -> Holder:
    """Make a process of another host the holder."""
    holder = replace(Holder("node-b", 4242, 77, "node-b boot", "2026-11-24 16:00:00 UTC"), **values)
    run.mkdir(exist_ok=True)
    (run / LOCK).write_text(json.dumps(asdict(holder)))
    return holder


def hold_lock(run: str, seconds: float, stops: bool, pipe: Any) -> None:
    """Hold the lock for a while, in a process of its own."""
    lock = RunLock.acquire(Path(run))
    if stops:
        lock.mark_stopping()
    pipe.send(os.getpid())
    time.sleep(seconds)
    os._exit(0)


def held_by_another(run: Path, seconds: float = 60.0, *, stops: bool = False) -> Any:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=hold_lock, args=(str(run), seconds, stops, theirs), daemon=True)
    process.start()
    theirs.close()
    assert ours.recv() == process.pid
    return process


# With flock -----------------------------------------------------------------------------------------------------------


def test_acquire_names_the_holder_of_the_lock(tmp_path: Path, locks: Any) -> None:
    first = held_by_another(tmp_path / "run")
    with pytest.raises(ConfigError, match=f"in use by process {first.pid} on .*, since 20.* UTC") as refused:
        locks(tmp_path / "run")
    assert refused.value.exit_status == 2
    first.kill()
    first.join()
    start = time.monotonic()
    locks(tmp_path / "run")
    assert time.monotonic() - start < 1, "a killed process holds nothing"
    assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()


def test_acquire_waits_for_a_stopping_run(tmp_path: Path, locks: Any) -> None:
    first = held_by_another(tmp_path, 0.7, stops=True)
    with captured_messages("trainer.fault_tolerance.run_lock") as messages:
        locks(tmp_path)
    first.join(1)
    assert not first.is_alive()
    (message,) = messages
    assert f"for process {first.pid} on" in message
    assert "is stopping" in message


def test_acquire_gives_up_after_a_timeout(tmp_path: Path, locks: Any) -> None:
    first = held_by_another(tmp_path, stops=True)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=f"process {first.pid} .*, which is stopping,"):
        locks(tmp_path)
    assert 1.4 < time.monotonic() - start < 5
    first.kill()
    first.join()


def test_forked_child_does_not_keep_the_lock(tmp_path: Path, locks: Any) -> None:
    """A forked worker may outlive its killed parent."""
    reading, writing = os.pipe()
    parent = os.fork()
    if parent == 0:
        RunLock.acquire(tmp_path)
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        os.write(writing, str(child).encode())
        time.sleep(30)
        os._exit(0)
    child = int(os.read(reading, 20))
    try:
        with pytest.raises(ConfigError, match=f"process {parent} on"):
            locks(tmp_path)
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        locks(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.fast
def test_released_lock_can_be_acquired(tmp_path: Path, locks: Any) -> None:
    first = locks(tmp_path)
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
        locks(tmp_path)
    first.release()
    first.release()
    first.mark_stopping()
    locks(tmp_path)
    RunLock().mark_stopping()
    RunLock().release()


@pytest.mark.fast
@pytest.mark.parametrize("content", ["", "x" * 3000, "[" * 2000, '{"pid": 3}', "[1]"])
def test_damaged_lock_file_is_rewritten(content: str, tmp_path: Path, locks: Any) -> None:
    (tmp_path / LOCK).write_text(content)
    locks(tmp_path)
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
        locks(tmp_path)


@pytest.mark.fast
def test_acquire_rejects_an_unwritable_lock_file(tmp_path: Path, locks: Any) -> None:
    (tmp_path / "victim").touch()
    (tmp_path / LOCK).symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError, match="cannot write"):
        locks(tmp_path)
    assert (tmp_path / "victim").read_bytes() == b""


# Without flock --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_flock")
def test_heartbeat_replaces_a_missing_flock(tmp_path: Path, locks: Any) -> None:
    first = locks(tmp_path)
    before = (tmp_path / LOCK).stat().st_mtime_ns
    time.sleep(0.5)
    assert (tmp_path / LOCK).stat().st_mtime_ns > before
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        first.release()
        stat = process_stat(other.pid)
        assert stat is not None
        local = replace(current_process(), pid=other.pid, started=stat.start_ticks)
        (tmp_path / LOCK).write_text(json.dumps(asdict(local)))
        with pytest.raises(ConfigError, match=f"process {other.pid} on"):
            locks(tmp_path)
    finally:
        other.kill()
        other.wait()
    start = time.monotonic()
    locks(tmp_path)
    assert time.monotonic() - start < 0.6, "a process of this host that is dead holds nothing"


@pytest.mark.usefixtures("without_flock")
def test_acquire_waits_for_a_host_without_heartbeat(tmp_path: Path, locks: Any) -> None:
    write_remote_holder(tmp_path)
    start = time.monotonic()
    locks(tmp_path)
    assert 0.7 < time.monotonic() - start < 4
    held = json.loads((tmp_path / LOCK).read_text())
    assert held["pid"] == os.getpid()


@pytest.mark.usefixtures("without_flock")
def test_stale_heartbeat_of_another_host_is_taken_over(tmp_path: Path, locks: Any) -> None:
    write_remote_holder(tmp_path)
    os.utime(tmp_path / LOCK, (time.time() - 100,) * 2)
    start = time.monotonic()
    locks(tmp_path)
    assert time.monotonic() - start < 0.6


@pytest.mark.usefixtures("without_flock")
def test_acquire_rejects_a_lock_with_a_live_heartbeat(tmp_path: Path, locks: Any) -> None:
    write_remote_holder(tmp_path)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.2):
            os.utime(tmp_path / LOCK)

    (thread := threading.Thread(target=beat)).start()
    start = time.monotonic()
    try:
        with pytest.raises(ConfigError, match="process 4242 on node-b, since 2026-11-24 16:00:00 UTC"):
            locks(tmp_path)
    finally:
        ended.set()
        thread.join()
    assert time.monotonic() - start < 0.8, "as soon as it is seen to live"


def test_shared_file_system_needs_a_heartbeat(tmp_path: Path, locks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On such file systems `flock` may work within one host only."""
    monkeypatch.setattr(run_lock, "_file_system_type", lambda path: "nfs4")
    write_remote_holder(tmp_path)
    lock = locks(tmp_path)
    assert lock._heartbeat_stop is not None
    with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
        locks(tmp_path)


def test_overtaken_holder_exits(tmp_path: Path) -> None:
    """A process suspended for more than a minute must not write any more."""

    def overtaken() -> None:
        run_lock._file_system_type = lambda path: "nfs"
        RunLock.acquire(tmp_path)
        write_remote_holder(tmp_path)
        time.sleep(30)
        os._exit(0)

    child = os.fork()
    if child == 0:
        overtaken()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2


@pytest.mark.fast
def test_file_system_type_of_a_path() -> None:
    assert run_lock._file_system_type(Path("/proc/self")) == "proc"


# By the command -------------------------------------------------------------------------------------------------------


def train_with_slow_save(config: dict[str, Any]) -> None:
    """Train as the command does, with a first save of two seconds."""
    save = CheckpointSaver.save

    def slowly(self: Any, *arguments: Any, **options: Any) -> None:
        CheckpointSaver.save = save  # type: ignore[method-assign]
        time.sleep(2)
        save(self, *arguments, **options)

    CheckpointSaver.save = slowly  # type: ignore[method-assign]
    launch = Launch.from_environment()
    train(check_config(config, world_size=launch.world_size, device="cpu"), launch, StopRequests(launch.rank))


@pytest.mark.parametrize("world", [1, 2])
def test_second_start_does_not_disturb_the_first(world: int, tiny: dict[str, Any], tmp_path: Path) -> None:
    """Also with several ranks, of which only rank 0 reads; commands that only read are not refused."""
    config = with_values(tiny, training__log_every_steps=1, checkpoint__every_steps=2, data__validation=[])
    (tmp_path / "config.json").write_text(json.dumps(config))
    command, run = (TRAIN, "--config", str(tmp_path / "config.json")), tmp_path / "run"
    failed: list[BaseException] = []

    def first() -> None:
        try:
            run_ranks(train_with_slow_save, world, config)
        except BaseException as error:
            failed.append(error)

    (thread := threading.Thread(target=first)).start()
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    holder = json.loads((run / LOCK).read_text())["pid"]
    second, looks = run_command(*command, world=world), run_command(*command, "--dry_run", world=world)
    assert thread.is_alive(), "the first was still training"
    thread.join()
    assert not failed, failed
    assert second.status == 2, second.out
    assert f"in use by process {holder} on" in second.err
    assert "Traceback" not in "".join(second.errors)
    assert looks.status == 0, looks.err
    rows = [(row["attempt"], row["step"]) for row in read_rows(run) if row["split"] == "train"]
    assert rows == [(1, 1), (1, 2), (1, 3), (1, 4)]
    for folder in (run / "checkpoints").glob("step-*"):
        verify_files(folder, read_manifest(folder))
    again = run_command(*command, world=world)
    assert again.status == 0, again.err
    assert "finished at step 4" in again.out


def states_while_saving(config: dict[str, Any]) -> list[str]:
    """Return the state in the lock file at each save of a run whose last rank is asked to stop in the first one."""
    states, save = list[str](), CheckpointSaver.save
    launch = Launch.from_environment()

    def recorded(self: Any, *arguments: Any, **options: Any) -> None:
        states.append(json.loads((Path(config["run"]["output_dir"]) / LOCK).read_text())["state"])
        if len(states) == 1 and launch.rank == launch.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
        save(self, *arguments, **options)

    CheckpointSaver.save = recorded  # type: ignore[method-assign]
    requests = StopRequests(launch.rank)
    requests.install()
    try:
        train(check_config(config, world_size=launch.world_size, device="cpu"), launch, requests)
    except Preempted:
        return states
    raise AssertionError("it did not stop")


def test_lock_file_shows_that_the_run_is_stopping(tiny: dict[str, Any]) -> None:
    """Also if another rank than the holder is asked to stop."""
    config = with_values(tiny, training__max_steps=50, checkpoint__every_steps=2, data__validation=[])
    assert run_ranks(states_while_saving, 2, config)[0] == ["running", "stopping"]


@pytest.mark.parametrize("world", [2])
def test_all_ranks_exit_when_rank_zero_refuses(world: int, tiny: dict[str, Any], tmp_path: Path) -> None:
    """For the directory of another run: only rank 0 reads it, and one message is printed."""
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    assert run_command(TRAIN, "--config", str(tmp_path / "config.json")).status == 0
    other = with_values(tiny, run__seed=5)
    (tmp_path / "config.json").write_text(json.dumps(other))
    ended = run_command(TRAIN, "--config", str(tmp_path / "config.json"), world=world)
    assert ended.status == 2
    assert "run.seed: 5 here, 11 in the run directory" in ended.err
    assert "Traceback" not in "".join(ended.errors)


def test_orphaned_run_refuses_a_second_launch(tiny: dict[str, Any], tmp_path: Path) -> None:
    """With `deepspeed` itself: rank 0 of the first run still writes, whoever started it."""
    run = tmp_path / "run"
    first = held_by_another(run)
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    command = deepspeed_command("--config", str(tmp_path / "config.json"))
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    first.kill()
    first.join()
    assert ended.returncode == 2, ended.stderr
    assert f"in use by process {first.pid} on" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (run / "metrics.jsonl").exists()
