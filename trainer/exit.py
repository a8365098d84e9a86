"""How a run ends when something is wrong: one readable message, and the exit status of DESIGN 2.4."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

from trainer.distributed import Launch
from trainer.errors import ConfigError, Preempted, Problem, RankLost, RanksDifferError, TesseraError
from trainer.fault_tolerance import StopRequests
from trainer.sanitize import sanitize_text

_CONFIG_ERROR_DELAY_SECONDS = 120.0
_OTHER_ERROR_DELAY_SECONDS = 10.0


class CommandLineParser(argparse.ArgumentParser):
    """A parser whose complaints are configuration errors, so that many ranks make one of them."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(Problem("command line", message, f"See {self.prog} --help"))


def read_launch() -> Launch:
    """What the launcher says about this process; ends the process with status 2 where that is wrong."""
    try:
        return Launch.from_environment()
    except ConfigError as error:
        _print_error(error, Launch())
        _end_process(error.exit_status)


@contextlib.contextmanager
def exit_on_errors(launch: Launch, requests: StopRequests | None = None) -> Iterator[None]:
    """Ends the process: with 0, or with the message and status of one of our errors. Others keep their traceback.

    A launcher ends all ranks as soon as one leaves. So that rank 0's message is never lost, the others wait
    for it to speak and be ended with it: long where every rank finds the same mistake, briefly where they may
    be the only one. A stop request that has come before has no launcher behind it that waits for a status; one that
    comes meanwhile ends the process.
    """
    requests = requests or StopRequests()
    try:
        yield
        _end_process(0)
    except Preempted as preempted:
        if launch.rank == 0:
            _print(f"[tessera] {preempted}")
        _end_process(preempted.exit_status)
    except RankLost as error:
        requests.release()
        if error.reports_first:
            _print_error(error, launch)
        time.sleep(error.patience if requests.request is None else 0)
        if not error.reports_first:
            _print_error(error, launch)
        _end_process(error.exit_status)
    except TesseraError as error:
        requests.release()
        if launch.rank != 0 and requests.request is None:
            is_on_all_ranks = isinstance(error, ConfigError) and not isinstance(error, RanksDifferError)
            time.sleep(_CONFIG_ERROR_DELAY_SECONDS if is_on_all_ranks else _OTHER_ERROR_DELAY_SECONDS)
        _print_error(error, launch)
        _end_process(error.exit_status)
    except Exception:
        requests.release()
        # Maybe only another rank's end, on which this one's collective has failed: that one's status is the run's.
        if launch.world_size > 1 and requests.request is None:
            time.sleep(_OTHER_ERROR_DELAY_SECONDS)
        raise


def _print(*lines: str) -> None:
    """To standard error, where somebody still reads it: a launcher that was killed may have taken it along."""
    with contextlib.suppress(OSError):
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def _print_error(error: TesseraError, launch: Launch) -> None:
    origin = f" (rank {launch.rank} on {socket.gethostname()})" if launch.rank else ""
    lines = sanitize_text(str(error)).split("\n")
    if isinstance(error, ConfigError) and len(lines) > 1:
        _print(f"error{origin}: {len(lines)} mistakes", *(f"  {line}" for line in lines))
    else:
        _print(f"error{origin}: {lines[0]}", *lines[1:])


def _end_process(status: int) -> NoReturn:
    """Ends the process at once: collectives of a world that broke, or a tracker that hangs, would hold it up."""
    for flush in (logging.shutdown, sys.stdout.flush, sys.stderr.flush):
        with contextlib.suppress(OSError):
            flush()
    os._exit(status)
