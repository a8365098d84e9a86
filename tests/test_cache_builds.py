"""Builds of the cache that fail, are killed, or meet a full disk."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch._C._distributed_c10d import HashStore

from tests.configs import with_values
from tests.data_helpers import open_train
from tests.harness import CommandResult, run_command
from trainer.data.cache import Cache
from trainer.data.indexed import IndexedWriter
from trainer.distributed import Launch
from trainer.errors import ConfigError, DataError

TRAIN = str(Path(__file__).parent.parent / "launch" / "train.py")

pytestmark = pytest.mark.fast


def test_failed_build_leaves_no_files(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "unfinished").write_text("x")
        raise DataError("broken")

    with pytest.raises(DataError):
        Cache(tmp_path).entry("key", lambda: "content", "thing", fail)
    assert [p for p in tmp_path.iterdir() if p.is_dir() and "thing" in p.name] == []
    folder = Cache(tmp_path).entry("key", lambda: "content", "thing", lambda f: None)
    assert (folder / "complete.json").exists()


def build_forever(folder: Path) -> None:
    """Write one file, then block."""
    (folder / "unfinished").write_text("x")
    time.sleep(600)


def start_building(root: Path) -> multiprocessing.process.BaseProcess:
    """Start a process that holds the lock of an unfinished entry."""
    process = multiprocessing.get_context("fork").Process(
        target=lambda: Cache(root).entry("key", lambda: "content", "thing", build_forever), daemon=True
    )
    process.start()
    deadline = time.monotonic() + 20
    while not list(root.glob(".thing-*.partial/unfinished")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def test_sweep_spares_running_builds(tmp_path: Path) -> None:
    process = start_building(tmp_path)
    try:
        Cache(tmp_path).sweep()
        assert list(tmp_path.glob(".thing-*.partial/unfinished")), "another process is writing it"
    finally:
        process.kill()
        process.join()
    Cache(tmp_path, Launch(1, 2, 1, 2), HashStore()).sweep()
    assert list(tmp_path.glob(".thing-*.partial")), "only the builder sweeps"
    Cache(tmp_path).sweep()
    assert not list(tmp_path.glob(".thing-*.partial"))


def test_unlocked_partial_is_swept_after_a_day(tmp_path: Path) -> None:
    """Builders of earlier versions held no lock, so only the age shows that they are gone."""
    for name, age in (("old", 25), ("new", 23)):
        partial = tmp_path / f".tokens-{name}.0123abcd.partial"
        partial.mkdir()
        (partial / "tokens.bin").write_bytes(b"x")
        for path in (partial / "tokens.bin", partial):
            os.utime(path, (time.time() - age * 3600,) * 2)
    Cache(tmp_path).sweep()
    assert [p.name for p in tmp_path.iterdir()] == [".tokens-new.0123abcd.partial"]


def test_prepare_data_sweeps_leftovers(tiny: dict[str, Any], tmp_path: Path) -> None:
    leftover = tmp_path / ".tokens-0.locked-0123abcd.partial"
    leftover.mkdir()
    open_train(with_values(tiny, data__cache_dir=str(tmp_path), data__validation=[]))
    assert not leftover.exists()


def assert_full_disk_error(ended: CommandResult, cache: Path, entry: str) -> None:
    """Check the exit status, the message, and that nothing is left in the cache."""
    assert ended.status == 2, ended.err
    assert "Traceback" not in ended.err
    assert f"data.cache_dir: '{cache}' cannot be written to: " in ended.err
    assert not list(cache.glob(f"{entry}-*"))
    assert not list(cache.glob(".*.partial"))


@pytest.mark.parametrize(("entry", "size"), [("tokenizer", 8192), ("tokens", 61_440)])
def test_full_disk_exits_with_2(entry: str, size: int, tiny: dict[str, Any], tmp_path: Path) -> None:
    """While writing the tokenizer, which a Rust library does, and while writing token files."""
    cache = tmp_path / "cache"
    cache.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(cache)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs root to mount a small disk")
    try:
        text = json.dumps({"text": " ".join(f"word{n}" for n in range(300))}) + "\n"
        (tmp_path / "large.jsonl").write_text(text * 60)
        config = with_values(tiny, data__cache_dir=str(cache), data__train=[{"path": str(tmp_path / "large.jsonl")}])
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert_full_disk_error(run_command(TRAIN, "--config", str(tmp_path / "config.json")), cache, entry)
    finally:
        subprocess.run(["umount", "-l", str(cache)], check=True)


def test_file_size_limit_is_a_config_error(tmp_path: Path) -> None:
    """The same error as for a full disk, in a test that needs no root."""

    def build(folder: Path) -> None:
        with IndexedWriter(folder / "tokens", np.uint16) as writer:
            writer.add(range(20_000))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(ConfigError, match=r"data\.cache_dir: '.*' cannot be written to: File too large"):
            Cache(tmp_path).entry("key", lambda: "content", "thing", build)
    finally:
        signal.signal(signal.SIGXFSZ, previous)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.glob("thing-*"))
    assert not list(tmp_path.glob(".thing-*.partial"))
