"""The end of a process after an error: one readable message, and the exit status of its class."""

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
"""Delay of ranks other than 0 after an error that all ranks have, so that rank 0 reports it."""

_OTHER_ERROR_DELAY_SECONDS = 10.0
"""Delay of ranks other than 0 after an error that may have occurred on them alone."""


class CommandLineParser(argparse.ArgumentParser):
    """A parser that raises its errors as configuration errors, which many ranks report once."""

    def error(self, message: str) -> NoReturn:
        """Raise an error of the command line."""
        raise ConfigError(Problem("command line", message, f"See {self.prog} --help"))


def read_launch() -> Launch:
    """Return the launcher's description of this process; end the process with status 2 where it is invalid."""
    try:
        return Launch.from_environment()
    except ConfigError as error:
        _print_error(error, Launch())
        _end_process(error.exit_status)


@contextlib.contextmanager
def exit_on_errors(launch: Launch, requests: StopRequests | None = None) -> Iterator[None]:
    """End the process: with 0, or with the message and status of one of our errors. Others keep their traceback.

    A launcher ends all ranks as soon as one exits. To keep rank 0's message, the other ranks wait to be ended with it:
    long after an error that all ranks have, briefly after an error that may have occurred on them alone. They do not
    wait after a stop request, because its launcher does not wait for a status; one that arrives meanwhile ends the
    process.
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
        # The cause may be another rank that ended, which made this rank's collective fail: its status is the run's.
        if launch.world_size > 1 and requests.request is None:
            time.sleep(_OTHER_ERROR_DELAY_SECONDS)
        raise


def _print(*lines: str) -> None:
    """Print to standard error, which a killed launcher may have closed."""
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
    """End the process at once, because collectives of a broken world, or a tracker that hangs, would block an exit."""
    for flush in (logging.shutdown, sys.stdout.flush, sys.stderr.flush):
        with contextlib.suppress(OSError):
            flush()
    os._exit(status)
