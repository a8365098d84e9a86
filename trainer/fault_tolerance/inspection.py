"""Inspection of running processes: stacks, collectives, process states."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from trainer.compat.torch.flight_recorder import dump_flight_recorder, flight_recorder_variables
from trainer.fault_tolerance.processes import process_stat

_COLLECTIVE_FILES = (
    f"{os.sep}torch{os.sep}distributed{os.sep}distributed_c10d.py",
    f"{os.sep}deepspeed{os.sep}comm{os.sep}",
)
_DEBUGGERS = {"bdb", "pdb", "pydevd", "debugpy"}


def process_state(pid: int) -> str:
    """Return `running`, `stopped` (by SIGSTOP or a debugger) or `dead`."""
    stat = process_stat(pid)
    return "dead" if stat is None or stat.is_dead else "stopped" if stat.is_stopped else "running"


def _main_thread_frames() -> Iterator[FrameType]:
    """Yield the stack frames of the main thread, innermost first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        yield frame
        frame = frame.f_back


def main_thread_location() -> tuple[str, bool]:
    """Locate the main thread, as `function (file:line)`, and return whether it is inside a collective.

    Only collectives that Python waits for are recognized: on a GPU the host may wait for them in any operation.
    """
    frames = list(_main_thread_frames())
    if not frames:
        return "", False
    collective_frames = [
        frame for frame in frames if any(part in frame.f_code.co_filename for part in _COLLECTIVE_FILES)
    ]
    if not collective_frames:
        return _location(frames[0]), False
    names = [frame.f_code.co_name for frame in collective_frames if hasattr(dist, frame.f_code.co_name)]
    caller = next(
        (f for f in frames[frames.index(collective_frames[-1]) :] if f not in collective_frames), collective_frames[-1]
    )
    return f"{names[-1] if names else collective_frames[-1].f_code.co_name} in {_location(caller)}", True


def _location(frame: FrameType) -> str:
    return f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


def is_debugged() -> bool:
    """Return True if the main thread is in a Python debugger, or a debugger is attached to the process."""
    if any(str(frame.f_globals.get("__name__", "")).partition(".")[0] in _DEBUGGERS for frame in _main_thread_frames()):
        return True
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("TracerPid:"):
                return int(line.split()[1]) != 0
    return False


def dump_stacks(path: Path) -> None:
    """Append the stacks of all threads of this process to a file."""
    with contextlib.suppress(OSError), path.open("a") as file:
        faulthandler.dump_traceback(file, all_threads=True)


def enable_flight_recorder(logs: Path) -> None:
    """Switch on torch's flight recorder, and NCCL's own dump of it after a timeout.

    Variables that the environment sets already are kept. Must be called before the first process group is created.
    """
    size_variable, file_variable = flight_recorder_variables()
    os.environ.setdefault(size_variable, "2000")
    os.environ.setdefault(file_variable, str(logs / "nccl-trace-rank-"))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def write_flight_recorder(path: Path) -> bool:
    """Write the latest collectives of this rank as JSON.

    Returns:
        False if none was recorded or the file cannot be written.
    """
    try:
        text = dump_flight_recorder()
        if b'"entries"' not in text:
            return False
        path.write_bytes(text)
    except (OSError, RuntimeError, TypeError):
        return False
    return True
