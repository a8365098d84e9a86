"""Start of ranks: environment, store, process groups, extensions, logs, seeds, agreement."""

from __future__ import annotations

import errno
import logging
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tests.harness import get_free_port, run_command, run_ranks
from trainer import distributed, exit
from trainer.distributed import (
    Launch,
    agree,
    configure_logging,
    extensions,
    joined_world,
    load_extension,
    open_store,
    remove_stale_buffers,
    seed_everything,
)
from trainer.errors import CheckpointError, ConfigError, Problem
from trainer.topology import AXES, Axis, Topology

TRAIN = str(Path(__file__).parent.parent / "launch" / "train.py")


PRODUCTS: list[tuple[Axis, ...]] = [("pipeline", "tensor"), ("replica", "data"), AXES]


def _sums(sizes: dict[str, int]) -> dict[tuple[Axis, ...], int]:
    """Return the sum of the ranks in each group of this rank, by axes."""
    launch = Launch.from_environment()
    with joined_world(launch, Topology.of(launch.world_size, launch.rank, **sizes), seed=1) as world:
        sums = {}
        for axes in (*((axis,) for axis in AXES), *PRODUCTS):
            value = torch.tensor(launch.rank)
            torch.distributed.all_reduce(value, group=world.groups.of(*axes))
            sums[axes] = int(value)
    return sums


@pytest.mark.parametrize(
    "sizes",
    [{"pipeline": 2, "tensor": 2}, {"tensor": 4}, {}, {"replica": 2, "pipeline": 2}, {"replica": 2, "expert": 2}],
)
def test_process_groups_sum_over_their_axes(sizes: dict[str, int]) -> None:
    for rank, sums in enumerate(run_ranks(_sums, 8, sizes)):
        topology = Topology.of(8, rank, **sizes)
        assert sums == {axes: sum(topology.ranks_of(*axes)) for axes in sums}


HOLDER = """
import mmap, os, sys, time
file = open(sys.argv[1], "r+b")
if sys.argv[2] == "map":
    kept = mmap.mmap(file.fileno(), 4096)
    file.close()
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.fast
def test_remove_stale_buffers_keeps_recent_and_used_files() -> None:
    folder = Path("/dev/shm")
    names = ("stale", "open", "map", "young")
    files = {name: folder / f"deepspeed_allreduce_buffer_{os.getuid()}_test_{name}_0" for name in names}
    holders = []
    try:
        for name, file in files.items():
            file.write_bytes(b"\0" * 4096)
            if name in ("open", "map"):
                command = [sys.executable, "-c", HOLDER, str(file), name]
                holders.append(subprocess.Popen(command, stdout=subprocess.PIPE))
                assert holders[-1].stdout is not None
                assert holders[-1].stdout.readline() == b"ready\n"
            if name != "young":
                os.utime(file, (0, 0))
        assert remove_stale_buffers() >= 1
        assert [name for name, file in files.items() if file.exists()] == ["open", "map", "young"]
        for holder in holders:
            holder.kill()
            holder.wait()
        remove_stale_buffers()
        assert [name for name, file in files.items() if file.exists()] == ["young"]
    finally:
        for holder in holders:
            holder.kill()
        for file in files.values():
            file.unlink(missing_ok=True)


def test_load_extension_logs_the_lock_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(extensions, "LOG_INTERVAL_SECONDS", 0.1)
    monkeypatch.setattr(extensions.log, "propagate", True)
    logging.getLogger("trainer").propagate = True
    caplog.set_level(logging.INFO)
    held = FileLock(str(tmp_path / "lock"), thread_local=False)
    held.acquire()
    threading.Timer(0.5, held.release).start()
    with extensions._logged_lock(tmp_path / "lock", "another process"):
        pass
    assert f"for another process ({tmp_path / 'lock'})" in caplog.text


@pytest.mark.fast
def test_load_extension_removes_the_lock_of_a_killed_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "some_op").mkdir()
    lock = tmp_path / "some_op" / "lock"
    lock.touch()
    loaded = []

    class Builder:
        name = "some_op"

        def load(self, verbose: bool) -> None:
            assert not lock.exists(), "torch would wait here for ever"
            loaded.append(self.name)

    class Accelerator:
        def create_op_builder(self, name: str) -> Builder:
            return Builder()

    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", Accelerator)
    load_extension("SomeBuilder")
    assert loaded == ["some_op"]


@pytest.mark.fast
def test_launch_reads_the_variables_of_each_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Launch.from_environment() == Launch(0, 1, 0, 1)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert Launch.from_environment() == Launch(5, 8, 1, 4)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"RANK": "abc"}, "RANK: must be a number from 0 to 0 (got 'abc')"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK: must be a number from 0 to 1 (got '-1')"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: must be a number from 0 to 1 (got '2')"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: must be a number of at least 1 (got '0')"),
        ({"WORLD_SIZE": "9" * 400}, "WORLD_SIZE: must be a number of at least 1 (got '999"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "LOCAL_RANK: must be a number from 0 to 1 (got 'x')"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "2"}, "LOCAL_RANK: must be a number from 0 to 1"),
        ({"WORLD_SIZE": "4", "LOCAL_SIZE": "5"}, "LOCAL_SIZE: must be a number from 1 to 4 (got '5')"),
        ({"RANK": ""}, "RANK: must be a number from 0 to 0 (got '')"),
    ],
)
def test_launch_rejects_an_invalid_environment(
    values: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as raised:
        Launch.from_environment()
    assert message in str(raised.value)
    assert len(raised.value.problems) == 1


@pytest.mark.fast
@pytest.mark.parametrize(
    ("address", "port", "message"),
    [
        ("127.0.0.1", None, "MASTER_PORT: must be a port from 1 to 65535"),
        ("127.0.0.1", "abc", "(got 'abc')"),
        ("127.0.0.1", "70000", "(got '70000')"),
        (None, "29500", "MASTER_ADDR: must be the host of rank 0"),
    ],
)
def test_open_store_requires_the_address_of_rank_zero(
    address: str | None, port: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise each rank would choose its own port, and wait for the others forever."""
    for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as raised:
        open_store(Launch(rank=0, world_size=2, local_rank=0, local_world_size=2))
    assert message in str(raised.value)


def test_train_command_exits_2_on_an_invalid_environment() -> None:
    ended = run_command(TRAIN, "--config", "x.json", environment={"RANK": "abc"})
    assert (ended.status, "Traceback" in ended.err) == (2, False)
    assert "error: RANK: must be a number from 0 to 0 (got 'abc')" in ended.err


@pytest.mark.fast
def test_seed_everything_is_equal_on_ranks_that_share_samples() -> None:
    def draw(rank: int, topology: Topology | None = None) -> float:
        seed_everything(7, topology or Topology.of(8, rank, tensor=2))
        return float(torch.rand(()))

    assert draw(0) == draw(1), "tensor ranks"
    assert len({draw(rank) for rank in (0, 2, 4, 6)}) == 4, "data ranks"
    topologies = [Topology(0), *(Topology(1, **{axis: 2}) for axis in AXES if axis != "tensor")]
    assert len({draw(0, topology) for topology in topologies}) == 6, "every other axis"


@pytest.mark.fast
def test_configure_logging_prints_on_rank_zero_and_writes_on_every_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = logging.getLogger("trainer.something")
    for rank in (0, 1):
        configure_logging(rank, tmp_path)
        log.info("hello from %d", rank)
    configure_logging(1)
    assert capsys.readouterr().out == "[tessera] hello from 0\n"
    assert "hello from 1" in (tmp_path / "rank-1.log").read_text()
    logging.getLogger("trainer").handlers.clear()


@pytest.mark.fast
def test_prepare_environment_keeps_existing_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/elsewhere")
    distributed.prepare_environment()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == "/elsewhere"
    assert distributed.local_device() == "cpu"


@pytest.mark.fast
@pytest.mark.parametrize(("world", "waits"), [(2, True), (1, False)])
def test_exit_on_errors_waits_for_the_rank_that_failed_first(
    world: int, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collective that fails because another rank exited must not set the status of the run."""
    waited: list[float] = []
    monkeypatch.setattr(exit.time, "sleep", waited.append)
    launch = Launch(rank=world - 1, world_size=world)
    with pytest.raises(RuntimeError, match="Connection closed"), exit.exit_on_errors(launch):
        raise RuntimeError("Connection closed by peer")
    assert (sum(waited) >= 5) == waits


def _errors_of_agreement() -> list[str]:
    """Return the errors of this rank if both ranks have a problem, only the last one has, and none has."""
    launch = Launch.from_environment()

    def config(rank: int) -> int:
        if launch.rank in (rank, 2):
            raise ConfigError(Problem("model.path", f"rank {launch.rank} misses a file"))
        return launch.rank

    def checkpoint() -> int:
        if launch.rank == 2:
            raise CheckpointError("damaged")
        return launch.rank

    told = []
    with joined_world(launch, Topology.of(launch.world_size, launch.rank), seed=1):
        for work in (lambda: config(1), checkpoint):
            with pytest.raises((ConfigError, CheckpointError)) as raised:
                agree(work)
            told.append(str(raised.value))
        told.append(str(agree(lambda: launch.rank)))
    return told


def test_agree_raises_the_errors_of_any_rank_on_all_ranks() -> None:
    for rank, (problems, damage, result) in enumerate(run_ranks(_errors_of_agreement, 3)):
        assert "rank 1 misses a file" in problems
        assert "rank 2 misses a file" in problems
        assert (damage, result) == ("damaged", str(rank))


def _listening_addresses() -> set[str]:
    """Return the addresses on which the sockets of this rank listen in a joined world, as in /proc/net."""
    launch = Launch.from_environment()
    topology = Topology.of(launch.world_size, launch.rank, pipeline=1, tensor=1)
    with joined_world(launch, topology, seed=1) as world:
        world.store.set(f"value of {launch.rank}", "seen")
        assert world.store.get(f"value of {1 - launch.rank}") == b"seen"
        links = (os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
        own = {link.removeprefix("socket:[").rstrip("]") for link in links if link.startswith("socket:")}
        rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
        torch.distributed.barrier()
        return {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in own}


def test_store_of_one_host_listens_on_loopback_only() -> None:
    found = run_ranks(_listening_addresses, 2)
    assert found[0], "rank 0 hosts the store"
    assert set().union(*found) == {"0100007F"}


def test_open_store_names_a_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        message = f"--master_port: cannot listen on port {port} .*Another run on this host may have it"
        with pytest.raises(ConfigError, match=message):
            open_store(Launch(rank=0, world_size=2, local_rank=0, local_world_size=2))


def test_open_store_falls_back_to_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    """With several hosts, of which this one has IPv6 disabled."""
    opened = socket.socket

    def without_ipv6(family: int = socket.AF_INET, *arguments: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return opened(family, *arguments)

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(get_free_port()))
    monkeypatch.setattr(distributed.store.socket, "socket", without_ipv6)
    store = open_store(Launch(rank=0, world_size=2, local_rank=0, local_world_size=1))
    store.set("key", "value")
    assert store.get("key") == b"value"
