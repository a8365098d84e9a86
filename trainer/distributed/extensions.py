"""DeepSpeed's compiled extensions."""

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


SECONDS_BETWEEN_LINES = 30.0


@contextlib.contextmanager
def _patient_lock(path: Path, holder: str) -> Iterator[None]:
    """Hold a file lock; log for whom this process waits."""
    lock, start = FileLock(str(path)), time.monotonic()
    while True:
        try:
            lock.acquire(timeout=SECONDS_BETWEEN_LINES)
            break
        except TimeoutError:
            log.info("waiting %s for %s (%s)", format_duration(time.monotonic() - start), holder, path)
    try:
        yield
    finally:
        lock.release()


def load_extension(builder: str) -> None:
    """Loads one of DeepSpeed's compiled extensions, compiling it first where needed (a minute or several, once).

    A process killed while it compiles leaves a lock file on which every later start would wait for ever. All
    our compiling happens under a lock that the kernel releases, so a lock file found while holding that is stale.
    """
    from deepspeed.accelerator import get_accelerator

    found = get_accelerator().create_op_builder(builder)
    if found is None:
        return
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    root.mkdir(parents=True, exist_ok=True)
    with _patient_lock(root / ".tessera.lock", f"another process that compiles or loads {found.name}"):
        for stale in root.rglob("lock"):
            log.warning("removing %s, left by a process that was killed while compiling", stale)
            stale.unlink(missing_ok=True)
        if not list(root.rglob(f"{found.name}.so")):
            log.info("compiling DeepSpeed's %s, once; this takes a minute or several", found.name)
        with contextlib.redirect_stdout(io.StringIO()):
            found.load(verbose=False)
