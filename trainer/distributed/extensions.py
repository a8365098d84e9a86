"""Compilation and loading of DeepSpeed's extensions."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from trainer.units import format_duration

log = logging.getLogger(__name__)


LOG_INTERVAL_SECONDS = 30.0


@contextlib.contextmanager
def _logged_lock(path: Path, holder: str) -> Iterator[None]:
    """Hold a file lock; log the wait for its present holder."""
    lock, start = FileLock(str(path)), time.monotonic()
    while True:
        try:
            lock.acquire(timeout=LOG_INTERVAL_SECONDS)
            break
        except TimeoutError:
            log.info("waiting %s for %s (%s)", format_duration(time.monotonic() - start), holder, path)
    try:
        yield
    finally:
        lock.release()


def load_extension(name: str) -> None:
    """Load one of DeepSpeed's extensions; compile it first if necessary (once, one to several minutes).

    A process that is killed while it compiles leaves a lock file, on which torch waits forever at every later start.
    All compilation here happens under a lock that the kernel releases, so that a lock file found under it is stale.

    Args:
        name: Class name of the op builder.
    """
    from deepspeed.accelerator import get_accelerator

    op_builder = get_accelerator().create_op_builder(name)
    if op_builder is None:
        return
    directory = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    directory.mkdir(parents=True, exist_ok=True)
    with _logged_lock(directory / ".tessera.lock", f"another process that compiles or loads {op_builder.name}"):
        for lock_file in directory.rglob("lock"):
            log.warning("removing %s of a process that was killed while compiling", lock_file)
            lock_file.unlink(missing_ok=True)
        if not list(directory.rglob(f"{op_builder.name}.so")):
            log.info("compiling DeepSpeed's %s (once, one to several minutes)", op_builder.name)
        with contextlib.redirect_stdout(io.StringIO()):
            op_builder.load(verbose=False)
