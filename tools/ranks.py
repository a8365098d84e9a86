"""Runs a function on several real processes over gloo, with real DeepSpeed, a few seconds a time.

A server process imports everything once and forks the ranks (`multiprocessing`'s forkserver), so that a rank
starts in milliseconds and its parent has never run a thread or a backward pass.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from trainer.distributed import free_port

SECONDS = 300.0
"""How long ranks may say nothing."""

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tools.preload"])


def _rank(
    function: Callable[..., Any], arguments: tuple[Any, ...], rank: int, world: int, port: int, pipe: Connection
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    # Plain gloo: no shared-memory extension, no 69 MB file a rank.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            result = function(*arguments)
        pipe.send((True, result))
    except BaseException:
        pipe.send((False, f"rank {rank} of {world}:\n{traceback.format_exc()}\n{said.getvalue()[-2000:]}"))
    finally:
        pipe.close()
        os._exit(0)


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns on each of `world` ranks, by rank.

    `function` must stand at the top of a module, and its arguments and results be picklable. Fails as soon as
    one rank fails, with that rank's traceback.
    """
    port = free_port()
    pipes, processes = [], []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(function, arguments, rank, world, port, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    results: dict[int, Any] = {}
    deadline = time.monotonic() + SECONDS
    try:
        while len(results) < world:
            ready = wait([p for r, p in enumerate(pipes) if r not in results], timeout=deadline - time.monotonic())
            if not ready:
                raise AssertionError(f"ranks {sorted(set(range(world)) - set(results))} said nothing for {SECONDS} s")
            for pipe in ready:
                rank = pipes.index(pipe)
                try:
                    sound, results[rank] = pipe.recv()
                except EOFError:
                    raise AssertionError(f"rank {rank} of {world} died without a word") from None
                if not sound:
                    raise AssertionError(results[rank])
    finally:
        for process in processes:
            process.join(2)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(world)]
