"""Ranks that share a cache: one builds, the others wait."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest
from torch._C._distributed_c10d import HashStore

from tests.data_helpers import damage, flip
from trainer.data.cache import Cache
from trainer.distributed import Launch
from trainer.errors import RanksDifferError

pytestmark = pytest.mark.fast


def slow_build(folder: Path) -> None:
    """Build for half a second."""
    time.sleep(0.5)
    (folder / "result").write_text("done")


def test_only_one_rank_builds(tmp_path: Path) -> None:
    built, opened, store = [], [], HashStore()

    def build(folder: Path) -> None:
        built.append(folder)
        slow_build(folder)

    def wait(rank: int) -> None:
        cache = Cache(tmp_path, Launch(rank, 4, rank, 4), store)
        opened.append(cache.entry("key", lambda: "content", "thing", build))

    ranks = [threading.Thread(target=wait, args=(rank,)) for rank in (3, 2, 1, 0)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(10)
    assert len(opened) == 4
    assert len(set(opened)) == len(built) == 1
    assert (opened[0] / "result").read_text() == "done"


def test_ranks_wait_for_rebuild(tmp_path: Path) -> None:
    """An entry that exists but is damaged must not be read before it is rebuilt."""
    store = HashStore()
    folder = Cache(tmp_path).entry("key", lambda: "content", "thing", slow_build)
    damage(folder / "result", flip(0))
    read = []

    def wait() -> None:
        entry = Cache(tmp_path, Launch(1, 2, 1, 2), store).entry("key", lambda: "content", "thing", slow_build)
        read.append((entry / "result").read_text())

    other = threading.Thread(target=wait)
    other.start()
    time.sleep(0.3)
    Cache(tmp_path, Launch(0, 2, 0, 2), store).entry("key", lambda: "content", "thing", slow_build)
    other.join(10)
    assert read == ["done"]


def test_ranks_with_different_files_fail_fast(tmp_path: Path) -> None:
    store, begin = HashStore(), time.monotonic()
    builder = threading.Thread(
        target=lambda: Cache(tmp_path, Launch(0, 2, 0, 2), store).entry("a", lambda: "c", "thing", slow_build)
    )
    builder.start()
    with pytest.raises(RanksDifferError, match="rank 1 sees other files than rank 0"):
        Cache(tmp_path, Launch(1, 2, 1, 2), store).entry("b", lambda: "c", "thing", slow_build)
    assert time.monotonic() - begin < 5
    builder.join(10)


def test_waiting_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.distributed.waiting.LOG_INTERVAL_SECONDS", 0.2)
    store = HashStore()
    waiter = threading.Thread(
        target=lambda: Cache(tmp_path, Launch(1, 2, 1, 2), store).entry("a", lambda: "c", "thing", slow_build)
    )
    with caplog.at_level(logging.INFO):
        waiter.start()
        Cache(tmp_path, Launch(0, 2, 0, 2), store).entry("a", lambda: "c", "thing", slow_build)
        waiter.join(10)
    assert "for rank 0 to prepare the data of this host" in caplog.text
