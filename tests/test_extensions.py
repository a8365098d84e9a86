"""Compilation locks and shared-memory files that killed processes leave."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from trainer.distributed import (
    extensions,
    load_extension,
    remove_stale_buffers,
)

HOLDER = """
import mmap, os, sys, time
file = open(sys.argv[1], "r+b")
if sys.argv[2] == "map":
    kept = mmap.mmap(file.fileno(), 4096)
    file.close()
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.fast
def test_remove_stale_buffers_keeps_recent_and_used_files() -> None:
    folder = Path("/dev/shm")
    names = ("stale", "open", "map", "young")
    files = {name: folder / f"deepspeed_allreduce_buffer_{os.getuid()}_test_{name}_0" for name in names}
    holders = []
    try:
        for name, file in files.items():
            file.write_bytes(b"\0" * 4096)
            if name in ("open", "map"):
                command = [sys.executable, "-c", HOLDER, str(file), name]
                holders.append(subprocess.Popen(command, stdout=subprocess.PIPE))
                assert holders[-1].stdout is not None
                assert holders[-1].stdout.readline() == b"ready\n"
            if name != "young":
                os.utime(file, (0, 0))
        assert remove_stale_buffers() >= 1
        assert [name for name, file in files.items() if file.exists()] == ["open", "map", "young"]
        for holder in holders:
            holder.kill()
            holder.wait()
        remove_stale_buffers()
        assert [name for name, file in files.items() if file.exists()] == ["young"]
    finally:
        for holder in holders:
            holder.kill()
        for file in files.values():
            file.unlink(missing_ok=True)


def test_load_extension_logs_the_lock_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(extensions, "LOG_INTERVAL_SECONDS", 0.1)
    monkeypatch.setattr(extensions.log, "propagate", True)
    logging.getLogger("trainer").propagate = True
    caplog.set_level(logging.INFO)
    held = FileLock(str(tmp_path / "lock"), thread_local=False)
    held.acquire()
    threading.Timer(0.5, held.release).start()
    with extensions._logged_lock(tmp_path / "lock", "another process"):
        pass
    assert f"for another process ({tmp_path / 'lock'})" in caplog.text


@pytest.mark.fast
def test_load_extension_removes_the_lock_of_a_killed_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "some_op").mkdir()
    lock = tmp_path / "some_op" / "lock"
    lock.touch()
    loaded = []

    class Builder:
        name = "some_op"

        def load(self, verbose: bool) -> None:
            assert not lock.exists(), "torch would wait here for ever"
            loaded.append(self.name)

    class Accelerator:
        def create_op_builder(self, name: str) -> Builder:
            return Builder()

    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", Accelerator)
    load_extension("SomeBuilder")
    assert loaded == ["some_op"]
