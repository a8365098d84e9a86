"""The key-value store that all ranks share, before there is a process group and beside it."""

from __future__ import annotations

import logging
import os
import socket
import time
from datetime import timedelta

from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore  # torch.distributed hides them from mypy

from trainer.distributed.environment import Launch, complete_environment
from trainer.errors import ConfigError, Problem

__all__ = ["JOIN_PATIENCE", "PrefixStore", "Store", "open_store"]

log = logging.getLogger(__name__)

JOIN_PATIENCE = timedelta(hours=24)
"""How long ranks wait for each other before training; another host may have a corpus to tokenize first."""

_CONNECT_TIMEOUT = timedelta(seconds=30)


def open_store(launch: Launch, patience: timedelta = JOIN_PATIENCE) -> Store:
    """Open the store of a run: hosted by rank 0, or under torchrun by its agent. All ranks must call it.

    Where all ranks are on one host, only this host can reach it. The store has no authentication: between hosts it
    belongs on a private network, like every store of torch's.

    Args:
        patience: how long a rank tries to connect to rank 0.

    Raises:
        ConfigError: the port is in use, or rank 0 cannot be reached.
    """
    if launch.world == 1:
        return HashStore()
    complete_environment(launch)
    if launch.is_on_one_host:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if launch.rank == 0 and not _is_hosted_by_agent():
        return _hosted_store(launch)
    return _connected_store(launch, patience)


def _is_hosted_by_agent() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


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
            Problem("MASTER_PORT", f"cannot listen on port {port} of {socket.gethostname()}: {error.strerror}",
                    "Take another one: deepspeed --master_port N, or torchrun --master_port N")
        ) from None  # fmt: skip
    return TCPStore(
        host, port, launch.world, True, JOIN_PATIENCE, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def _connected_store(launch: Launch, patience: timedelta) -> Store:
    host, port = _address()
    deadline = time.monotonic() + patience.total_seconds()
    while True:
        try:
            store = TCPStore(host, port, launch.world, False, _CONNECT_TIMEOUT, wait_for_workers=False)
        except RuntimeError as error:  # torch's DistNetworkError and DistStoreError
            if time.monotonic() > deadline:
                raise ConfigError(
                    Problem("MASTER_ADDR", f"rank {launch.rank} cannot reach rank 0 at {host}:{port}: {error}")
                ) from None
            log.info("waiting for rank 0 at %s:%d", host, port)
        else:
            store.set_timeout(JOIN_PATIENCE)
            return store
