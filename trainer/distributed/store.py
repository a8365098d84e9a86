"""The key-value store of all ranks: available before process groups, and independent of them."""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import HashStore, PrefixStore, Store, TCPStore

from trainer.distributed.environment import Launch, complete_environment
from trainer.distributed.phases import JOIN_TIMEOUT
from trainer.errors import ConfigError, Problem

log = logging.getLogger(__name__)

_CONNECT_TIMEOUT = timedelta(seconds=30)


def open_store(launch: Launch, timeout: timedelta = JOIN_TIMEOUT) -> Store:
    """Open the store of a run, which rank 0 hosts. Collective: all ranks must call it.

    If all ranks are on one host, only this host can reach it. Like all stores of torch it has no authentication, so
    that between hosts it belongs on a private network.

    Args:
        launch: This process, as the launcher describes it.
        timeout: How long a rank tries to connect to rank 0.

    Raises:
        ConfigError: the address of rank 0 is missing or invalid, its port is in use, or rank 0 cannot be reached.
    """
    if launch.world_size == 1:
        return HashStore()
    _refuse_bad_address()
    complete_environment(launch)
    if launch.is_on_one_host:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if _is_hosted_by_agent():
        return _open_store_via_agent(launch, timeout)
    address = _address()
    return _host_store(launch, *address) if launch.rank == 0 else _connect_store(launch, *address, timeout)


def _is_hosted_by_agent() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def _open_store_via_agent(launch: Launch, timeout: timedelta) -> Store:
    """Exchange the address of rank 0's store through the store of torchrun's agent.

    The agent's own store ends with the agent, and the ranks must still be able to save a checkpoint then.
    """
    agent = _connect_store(launch, *_address(), timeout)
    # The agent outlives its workers: keys written before a restart must not be read.
    key = f"tessera/store/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if launch.rank == 0:
        store = _host_store(launch, _reachable_address(launch), 0)
        agent.set(key, f"{store.host} {store.port}")
        return store
    host, port = agent.get(key).decode().split()
    return _connect_store(launch, host, int(port), timeout)


def _reachable_address(launch: Launch) -> str:
    """Return the address at which other hosts reach this one: the one from which it reaches the agent."""
    if launch.is_on_one_host:
        return "127.0.0.1"
    host, port = _address()
    family, socket_type, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket_type) as probe:
        probe.connect(address)  # a datagram socket sends nothing here
        address_of_host = str(probe.getsockname()[0])
    return host if address_of_host.startswith("127.") or address_of_host == "::1" else address_of_host


def _refuse_bad_address() -> None:
    """Refuse a missing address: unlike a single process, several ranks cannot choose one independently."""
    for name, expected in (("MASTER_ADDR", "the host of rank 0"), ("MASTER_PORT", "a port from 1 to 65535")):
        value = os.environ.get(name, "")
        is_port = value.isascii() and value.isdigit() and len(value) < 6 and 0 < int(value) < 65_536
        if not (is_port if name == "MASTER_PORT" else value.strip()):
            reason = f"must be {expected} if WORLD_SIZE is more than 1 (got {value!r})"
            remedy = "Launchers set this environment variable: start with deepspeed or torchrun"
            raise ConfigError(Problem(name, reason, remedy))


def _address() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _host_store(launch: Launch, host: str, port: int) -> TCPStore:
    """Host the store; port 0 means any free port."""
    try:
        listener = _listen(["127.0.0.1"] if launch.is_on_one_host else ["::", "0.0.0.0"], port)
    except OSError as error:
        reason = f"cannot listen on port {port} of {socket.gethostname()}: {error.strerror}"
        remedy = (
            "Another run on this host may use it, perhaps an earlier attempt of this run. For a second run choose "
            "another port: deepspeed --master_port N, or torchrun --master_port N"
        )
        raise ConfigError(Problem("--master_port", reason, remedy)) from None
    port = listener.getsockname()[1]
    return TCPStore(
        host, port, launch.world_size, True, JOIN_TIMEOUT, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def _listen(addresses: Sequence[str], port: int) -> socket.socket:
    """Listen on the first address whose family this host supports: IPv6 may be disabled."""
    for number, address in enumerate(addresses, start=1):
        try:
            listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if ":" in address:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.bind((address, port))
            listener.listen(2048)
            return listener
        except OSError as error:
            if number == len(addresses) or error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
    raise AssertionError("no address")


def _connect_store(launch: Launch, host: str, port: int, timeout: timedelta) -> Store:
    start = time.monotonic()
    while True:
        try:
            store = TCPStore(host, port, launch.world_size, False, _CONNECT_TIMEOUT, wait_for_workers=False)
        except RuntimeError as error:  # torch's DistNetworkError and DistStoreError
            if time.monotonic() - start > timeout.total_seconds():
                raise ConfigError(
                    Problem("MASTER_ADDR", f"rank {launch.rank} cannot reach rank 0 at {host}:{port}: {error}")
                ) from None
            _log_waiting(launch, f"waiting for rank 0 at {host}:{port} for {time.monotonic() - start:.0f} s")
        else:
            store.set_timeout(JOIN_TIMEOUT)
            return store


def _log_waiting(launch: Launch, line: str) -> None:
    """Log the wait for rank 0, and print it on one rank of each host: only rank 0 prints log lines."""
    log.info("%s", line)
    if launch.local_rank == (1 if launch.is_on_one_host else 0):
        print(f"[tessera] rank {launch.rank} on {socket.gethostname()}: {line}", file=sys.stderr, flush=True)


def open_second_connection(store: Store) -> Store:
    """Connect to the same store again, for a thread: a request that waits blocks all others of its connection."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if not isinstance(store, TCPStore):
        return store
    return TCPStore(store.host, store.port, None, False, _CONNECT_TIMEOUT, wait_for_workers=False)
