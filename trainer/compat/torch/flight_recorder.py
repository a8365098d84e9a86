"""torch's flight recorder: a ring buffer of the latest collectives of a rank."""

from __future__ import annotations

from collections.abc import Callable
from pkgutil import resolve_name

from trainer.compat.torch.names import FLIGHT_RECORDER_DUMPS


def flight_recorder_variables() -> tuple[str, str]:
    """Return the environment variables for the size of the buffer and for the file of NCCL's own dump.

    torch renamed them together with the function, and warns of the old names.
    """
    if "_dump_fr_trace_json" in _dumps():
        return "TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE"
    return "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"


def dump_flight_recorder() -> bytes:
    """Return the recorded collectives as JSON; empty where this build of torch has no recorder.

    Raises:
        RuntimeError: the recorder failed.
    """
    return next((dump() for dump in _dumps().values()), b"")


def _dumps() -> dict[str, Callable[[], bytes]]:
    """Functions that dump the buffer, by name, the preferred one first."""
    owners = [(resolve_name(path), names) for path, names in FLIGHT_RECORDER_DUMPS.items()]
    return {name: getattr(owner, name) for owner, names in owners for name in names if hasattr(owner, name)}
