"""The key-value store that all ranks share, before there is a process group and beside it."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from datetime import timedelta

from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore  # torch.distributed hides them from mypy

from trainer.distributed.environment import Launch, complete_environment
from trainer.distributed.phases import JOIN_PATIENCE
from trainer.errors import ConfigError, Problem

__all__ = ["JOIN_PATIENCE", "PrefixStore", "Store", "open_store", "second_connection"]

log = logging.getLogger(__name__)

_CONNECT_TIMEOUT = timedelta(seconds=30)


def open_store(launch: Launch, patience: timedelta = JOIN_PATIENCE) -> Store:
    """Open the store of a run: hosted by rank 0, or under torchrun by its agent. All ranks must call it.

    Where all ranks are on one host, only this host can reach it. The store has no authentication: between hosts it
    belongs on a private network, like every store of torch's.

    Args:
        patience: how long a rank tries to connect to rank 0.

    Raises:
        ConfigError: the address of rank 0 is missing or wrong, its port is in use, or rank 0 cannot be reached.
    """
    if launch.world == 1:
        return HashStore()
    _refuse_bad_address()
    complete_environment(launch)
    if launch.is_on_one_host:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if _is_hosted_by_agent():  # it outlives its workers: what those before a restart have written must not be read
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return PrefixStore(f"attempt_{attempt}", _connected_store(launch, patience))
    return _hosted_store(launch) if launch.rank == 0 else _connected_store(launch, patience)


def _is_hosted_by_agent() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def _refuse_bad_address() -> None:
    """Several ranks cannot choose an address each of their own, as one process does."""
    for name, expected in (("MASTER_ADDR", "the host of rank 0"), ("MASTER_PORT", "a port from 1 to 65535")):
        text = os.environ.get(name, "")
        is_port = text.isascii() and text.isdigit() and len(text) < 6 and 0 < int(text) < 65_536
        if not (is_port if name == "MASTER_PORT" else text.strip()):
            raise ConfigError(
                Problem(name, f"must be {expected} where WORLD_SIZE is more than 1 (got {text!r})",
                        "Launchers set this environment variable: start by deepspeed or torchrun")
            )  # fmt: skip


def _address() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _hosted_store(launch: Launch) -> Store:
    host, port = _address()
    listener = socket.socket(socket.AF_INET if launch.is_on_one_host else socket.AF_INET6)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1" if launch.is_on_one_host else "::", port))
        listener.listen(2048)
    except OSError as error:
        raise ConfigError(
            Problem("--master_port", f"cannot listen on port {port} of {socket.gethostname()}: {error.strerror}",
                    "Take another one: deepspeed --master_port N, or torchrun --master_port N")
        ) from None  # fmt: skip
    return TCPStore(
        host, port, launch.world, True, JOIN_PATIENCE, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def _connected_store(launch: Launch, patience: timedelta) -> Store:
    host, port = _address()
    start = time.monotonic()
    while True:
        try:
            store = TCPStore(host, port, launch.world, False, _CONNECT_TIMEOUT, wait_for_workers=False)
        except RuntimeError as error:  # torch's DistNetworkError and DistStoreError
            if time.monotonic() - start > patience.total_seconds():
                raise ConfigError(
                    Problem("MASTER_ADDR", f"rank {launch.rank} cannot reach rank 0 at {host}:{port}: {error}")
                ) from None
            _say_waiting(launch, f"waiting for rank 0 at {host}:{port} for {time.monotonic() - start:.0f} s")
        else:
            store.set_timeout(JOIN_PATIENCE)
            return store


def _say_waiting(launch: Launch, line: str) -> None:
    """On one rank a host: rank 0, which speaks on the console otherwise, is the one that is missing."""
    log.info("%s", line)
    if launch.local_rank == (1 if launch.is_on_one_host else 0):
        print(f"[tessera] rank {launch.rank} on {socket.gethostname()}: {line}", file=sys.stderr, flush=True)


def second_connection(store: Store) -> Store:
    """The same store over a connection of its own, for a thread: a request that waits blocks all others of its
    connection."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if not isinstance(store, TCPStore):
        return store
    return TCPStore(store.host, store.port, None, False, _CONNECT_TIMEOUT, wait_for_workers=False)
