"""The key-value store of all ranks."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest
import torch

from tests.harness import get_free_port, run_ranks
from trainer import distributed
from trainer.distributed import (
    Launch,
    joined_world,
    open_store,
)
from trainer.errors import ConfigError
from trainer.topology import Topology


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
        message = f"--master_port: cannot listen on port {port} .*Another run on this host may use it"
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
