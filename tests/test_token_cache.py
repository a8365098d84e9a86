"""The cache of token files: built once, verified when it is opened, swept, and safe on a full disk."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch._C._distributed_c10d import HashStore

from tests.configs import with_values
from tests.harness import run_command
from trainer.config.load import check_config
from trainer.data import integrity, prepare, prepare_data
from trainer.data.cache import Cache
from trainer.data.indexed import IndexedTokens, IndexedWriter
from trainer.distributed import Launch
from trainer.errors import ConfigError, DataError, RanksDifferError

pytestmark = pytest.mark.fast

TRAIN = str(Path(__file__).parent.parent / "launch" / "train.py")


@pytest.fixture
def cached_config(tiny: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A configuration with a cache of its own, already built."""
    config = with_values(tiny, data__cache_dir=str(tmp_path / "cache"), data__validation=[])
    open_train(config)
    return config


def open_train(config: dict[str, Any], **options: Any) -> IndexedTokens:
    return prepare_data(check_config(config, world_size=1, device="cpu"), **options).train[0]


def token_folder(config: dict[str, Any]) -> Path:
    (folder,) = Path(config["data"]["cache_dir"]).glob("tokens-*")
    return folder


def damage(path: Path, change: Any, *, keep_time: bool = True) -> None:
    """Change a file as a failing disk does, which leaves its modification time."""
    stat, raw = path.stat(), bytearray(path.read_bytes())
    raw = bytearray(change(raw) or raw)
    path.write_bytes(raw)
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def flip(at: int) -> Any:
    def change(raw: bytearray) -> None:
        raw[at] ^= 1

    return change


def zero(at: int, length: int) -> Any:
    def change(raw: bytearray) -> None:
        raw[at : at + length] = bytes(length)

    return change


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != integrity.RECORD_FILE}


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_time", [True, False])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokens.bin", zero(1000, 64)),
        ("tokens.bin", flip(2345)),
        ("tokens.bin", lambda raw: raw[:-2]),
        ("tokens.idx", flip(40)),
        ("tokens.idx", flip(-5)),
        ("fingerprint.txt", flip(0)),
        ("complete.json", flip(60)),
        ("complete.json", lambda raw: b"[" * 100_000),
        ("complete.json", lambda raw: b'{"format": 2, "files": 3}'),
        ("complete.json", lambda raw: b"\xff"),
    ],
)
def test_damaged_entry_is_rebuilt(
    name: str, change: Any, keep_time: bool, cached_config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    folder = token_folder(cached_config)
    expected = contents(folder)
    damage(folder / name, change, keep_time=keep_time)
    with caplog.at_level(logging.WARNING):
        open_train(cached_config)
    assert contents(folder) == expected
    (message,) = [r.getMessage() for r in caplog.records if "is built again" in r.getMessage()]
    assert str(folder) in message
    caplog.clear()
    open_train(cached_config)
    assert "is built again" not in caplog.text


@pytest.mark.parametrize("name", ["tokens.idx", "tokens.bin", "complete.json"])
def test_missing_file_is_rebuilt(name: str, cached_config: dict[str, Any]) -> None:
    folder = token_folder(cached_config)
    expected = contents(folder)
    (folder / name).unlink()
    open_train(cached_config)
    assert contents(folder) == expected
    assert (folder / integrity.RECORD_FILE).is_file()


def test_damaged_tokenizer_is_rebuilt(cached_config: dict[str, Any]) -> None:
    (folder,) = Path(cached_config["data"]["cache_dir"]).glob("tokenizer-*")
    expected, tokens = contents(folder), token_folder(cached_config)
    damage(folder / "tokenizer.json", zero(500, 200))
    open_train(cached_config)
    assert contents(folder) == expected
    assert token_folder(cached_config) == tokens, "the same tokenizer, so the same token files"


@pytest.mark.parametrize("reader", ["tokenize_source", "train_tokenizer"])
def test_file_modified_during_build_is_refused(
    reader: str, tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the cache has tokens of other text under the hash of the old one, and gives them to every later run."""
    old = Path(tiny["data"]["train"][0]["path"]).read_bytes()
    (tmp_path / "a.jsonl").write_bytes(old)
    config = with_values(tiny, data__cache_dir=str(tmp_path / "cache"), data__validation=[],
                         data__train=[{"path": str(tmp_path / "a.jsonl")}])  # fmt: skip
    read = getattr(prepare, reader)

    def read_while_growing(*arguments: Any) -> None:
        with (tmp_path / "a.jsonl").open("ab") as file:
            file.write(b'{"text": "one more document"}\n')
        read(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(prepare, reader, read_while_growing)
        with pytest.raises(DataError, match=r"a\.jsonl: changed while it was read"):
            open_train(config)
    more = len(open_train(config))
    (tmp_path / "a.jsonl").write_bytes(old)
    assert len(open_train(config)) == more - 1


def test_undamaged_entry_is_not_rebuilt(cached_config: dict[str, Any]) -> None:
    before = {p: p.stat().st_ino for p in token_folder(cached_config).iterdir()}
    open_train(cached_config)
    open_train(cached_config, verify_data=True)
    assert {p: p.stat().st_ino for p in token_folder(cached_config).iterdir()} == before


def large_entry(folder: Path, blocks: int) -> Path:
    """An entry of many blocks of 1 KiB."""
    folder.mkdir()
    (folder / "tokens.bin").write_bytes(random.Random(3).randbytes(1024 * blocks))
    integrity.seal(folder)
    return folder


def test_full_verification_finds_what_sampling_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start verifies first, last, and other random blocks each time; `--verify_data` all."""
    monkeypatch.setattr(integrity, "BLOCK_BYTES", 1024)
    folder = large_entry(tmp_path / "e", 100)
    for at in (0, 99 * 1024):
        damage(folder / "tokens.bin", flip(at))
        assert "wrong hash of block" in str(integrity.find_damage(folder, blocks=2))
        damage(folder / "tokens.bin", flip(at))
    damage(folder / "tokens.bin", flip(50 * 1024))
    found = sum(integrity.find_damage(folder, blocks=22) is not None for _ in range(300))
    assert 300 * 20 / 98 * 0.5 < found < 300 * 20 / 98 * 1.6, "20 of 98 blocks, others each time"
    assert integrity.find_damage(folder, blocks=None) == "tokens.bin: wrong hash of block 50 (from byte 51,200 on)"


def test_damage_in_sampled_block_is_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the samples after it would miss it."""
    samples: list[int] = []

    def chosen(count: int, blocks: int | None) -> Any:
        if blocks is None:
            return range(count)
        samples.append(blocks)
        return [50] if len(samples) == 1 else [0]

    def build(folder: Path) -> None:
        (folder / "tokens.bin").write_bytes(random.Random(3).randbytes(1024 * 100))

    monkeypatch.setattr(integrity, "BLOCK_BYTES", 1024)
    monkeypatch.setattr(integrity, "_select_blocks", chosen)
    folder = Cache(tmp_path, blocks=4).entry("key", lambda: "content", "thing", build)
    expected = contents(folder)
    damage(folder / "tokens.bin", flip(50 * 1024))
    Cache(tmp_path, blocks=4).entry("key", lambda: "content", "thing", build)
    assert samples == [4]
    assert contents(folder) == expected


def test_changed_mtime_verifies_every_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "BLOCK_BYTES", 1024)
    folder = large_entry(tmp_path / "e", 100)
    damage(folder / "tokens.bin", flip(50 * 1024), keep_time=False)
    assert "block 50" in str(integrity.find_damage(folder, blocks=2))


def test_copied_cache_is_fully_verified_once(cached_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = token_folder(cached_config)
    inode = (folder / "tokens.bin").stat().st_ino
    os.utime(folder / "tokens.bin", ns=(1, 1))
    open_train(cached_config)
    record = integrity.read_record(folder)
    assert record is not None
    assert record.files["tokens.bin"].mtime_ns == 1
    assert (folder / "tokens.bin").stat().st_ino == inode


def test_build_reads_back_every_block(tiny: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    """A disk that returns something else than what was written ends the run with 2, and leaves no entry."""
    drop = integrity._drop_cached_pages

    def failing_disk(path: Path) -> None:
        drop(path)
        if path.name == "tokens.bin":
            damage(path, flip(777))

    monkeypatch.setattr(integrity, "_drop_cached_pages", failing_disk)
    config = with_values(tiny, data__cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"data\.cache_dir: .*does not return what was written: tokens\.bin"):
        open_train(config)
    assert not list((tmp_path / "cache").glob("tokens-*"))


def test_build_syncs_before_rename(tiny: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    calls: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        calls.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(source: Any, target: Any) -> None:
        calls.append(("rename", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    config = with_values(tiny, data__cache_dir=str(tmp_path / "cache"), data__validation=[])
    open_train(config)
    folder = token_folder(config)
    at = calls.index(("rename", str(folder)))
    before = [Path(path) for what, path in calls[:at] if what == "sync"]
    partial = next(path.parent for path in before if path.name == "tokens.bin")
    assert {partial / "tokens.bin", partial / "tokens.idx", partial} <= set(before)
    assert ("sync", str(folder.parent)) in calls[at:]


def test_entry_without_hashes_is_rebuilt_once(cached_config: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """It has no hashes, so nothing says whether it is sound; a tokenizer is kept, and hashed as it is."""
    cache = Path(cached_config["data"]["cache_dir"])
    (tokenizer,) = cache.glob("tokenizer-*")
    folder, expected = token_folder(cached_config), contents(token_folder(cached_config))
    for entry in (tokenizer, folder):
        (entry / integrity.RECORD_FILE).write_text('{"format": 1}')
    (folder / "fingerprint.txt").unlink()
    damage(folder / "tokens.bin", zero(100, 50))
    inode = (tokenizer / "tokenizer.json").stat().st_ino
    with caplog.at_level(logging.WARNING):
        open_train(cached_config)
    assert contents(folder) == expected
    assert caplog.text.count("an earlier version wrote it, without hashes") == 1
    assert (tokenizer / "tokenizer.json").stat().st_ino == inode
    assert integrity.read_record(tokenizer) is not None
    assert integrity.read_record(folder) is not None


def test_run_resumes_with_rebuilt_cache(tiny: dict[str, Any], tmp_path: Path) -> None:
    """The run resumes on rebuilt token files; it does not say that its samples are others."""
    config = with_values(
        tiny, data__cache_dir=str(tmp_path / "cache"), data__validation=[], training__max_steps=2,
        checkpoint={"every_steps": 1},
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    first = run_command(TRAIN, "--config", str(tmp_path / "config.json"))
    assert first.status == 0, first.err
    folder = token_folder(config)
    damage(folder / "tokens.bin", zero(0, 4000))
    resumed = run_command(TRAIN, "--config", str(tmp_path / "config.json"), "--set", "training.max_steps=3")
    assert resumed.status == 0, resumed.err
    assert "is built again" in resumed.err + resumed.out
    damage(folder / "tokens.bin", flip(5000))
    flagged = ("--verify_data", "--set", "training.max_steps=4")
    verified = run_command(TRAIN, "--config", str(tmp_path / "config.json"), *flagged)
    assert verified.status == 0, verified.err
    assert "is built again" in verified.err + verified.out


# --- ranks -----------------------------------------------------------------------------------------------------------


def waiting_build(folder: Path) -> None:
    time.sleep(0.5)
    (folder / "result").write_text("done")


def test_only_one_rank_builds(tmp_path: Path) -> None:
    built, found, store = [], [], HashStore()

    def build(folder: Path) -> None:
        built.append(folder)
        waiting_build(folder)

    def wait(rank: int) -> None:
        cache = Cache(tmp_path, Launch(rank, 4, rank, 4), store)
        found.append(cache.entry("key", lambda: "content", "thing", build))

    ranks = [threading.Thread(target=wait, args=(rank,)) for rank in (3, 2, 1, 0)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(10)
    assert len(found) == 4
    assert len(set(found)) == len(built) == 1
    assert (found[0] / "result").read_text() == "done"


def test_ranks_wait_for_rebuild(tmp_path: Path) -> None:
    """Also where the entry is there already, but damaged."""
    store = HashStore()
    folder = Cache(tmp_path).entry("key", lambda: "content", "thing", waiting_build)
    damage(folder / "result", flip(0))
    read = []

    def wait() -> None:
        found = Cache(tmp_path, Launch(1, 2, 1, 2), store).entry("key", lambda: "content", "thing", waiting_build)
        read.append((found / "result").read_text())

    other = threading.Thread(target=wait)
    other.start()
    time.sleep(0.3)
    Cache(tmp_path, Launch(0, 2, 0, 2), store).entry("key", lambda: "content", "thing", waiting_build)
    other.join(10)
    assert read == ["done"]


def test_ranks_with_different_files_fail_fast(tmp_path: Path) -> None:
    store, begin = HashStore(), time.monotonic()
    builder = threading.Thread(
        target=lambda: Cache(tmp_path, Launch(0, 2, 0, 2), store).entry("a", lambda: "c", "thing", waiting_build)
    )
    builder.start()
    with pytest.raises(RanksDifferError, match="rank 1 sees other files than rank 0"):
        Cache(tmp_path, Launch(1, 2, 1, 2), store).entry("b", lambda: "c", "thing", waiting_build)
    assert time.monotonic() - begin < 5
    builder.join(10)


def test_waiting_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.distributed.waiting.LOG_INTERVAL_SECONDS", 0.2)
    store = HashStore()
    waiter = threading.Thread(
        target=lambda: Cache(tmp_path, Launch(1, 2, 1, 2), store).entry("a", lambda: "c", "thing", waiting_build)
    )
    with caplog.at_level(logging.INFO):
        waiter.start()
        Cache(tmp_path, Launch(0, 2, 0, 2), store).entry("a", lambda: "c", "thing", waiting_build)
        waiter.join(10)
    assert "for rank 0 to prepare the data of this host" in caplog.text


# --- killed and failed builds ----------------------------------------------------------------------------------------


def test_failed_build_leaves_no_files(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise DataError("broken")

    with pytest.raises(DataError):
        Cache(tmp_path).entry("key", lambda: "content", "thing", fail)
    assert [p for p in tmp_path.iterdir() if p.is_dir() and "thing" in p.name] == []
    folder = Cache(tmp_path).entry("key", lambda: "content", "thing", lambda f: None)
    assert (folder / "complete.json").exists()


def endless_build(folder: Path) -> None:
    (folder / "half").write_text("x")
    time.sleep(600)


def start_building(root: Path) -> Any:
    process = multiprocessing.get_context("fork").Process(
        target=lambda: Cache(root).entry("key", lambda: "content", "thing", endless_build), daemon=True
    )
    process.start()
    deadline = time.monotonic() + 20
    while not list(root.glob(".thing-*.partial/half")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def test_sweep_spares_running_builds(tmp_path: Path) -> None:
    process = start_building(tmp_path)
    try:
        Cache(tmp_path).sweep()
        assert list(tmp_path.glob(".thing-*.partial/half")), "another process is writing it"
    finally:
        process.kill()
        process.join()
    Cache(tmp_path, Launch(1, 2, 1, 2), HashStore()).sweep()
    assert list(tmp_path.glob(".thing-*.partial")), "only the builder sweeps"
    Cache(tmp_path).sweep()
    assert not list(tmp_path.glob(".thing-*.partial"))


def test_unlocked_partial_is_swept_after_a_day(tmp_path: Path) -> None:
    """It held no lock that could tell whether it is still written."""
    for name, age in (("old", 25), ("new", 23)):
        partial = tmp_path / f".tokens-{name}.0123abcd.partial"
        partial.mkdir()
        (partial / "tokens.bin").write_bytes(b"x")
        for path in (partial / "tokens.bin", partial):
            os.utime(path, (time.time() - age * 3600,) * 2)
    Cache(tmp_path).sweep()
    assert [p.name for p in tmp_path.iterdir()] == [".tokens-new.0123abcd.partial"]


def test_prepare_data_sweeps_leftovers(cached_config: dict[str, Any]) -> None:
    leftover = Path(cached_config["data"]["cache_dir"]) / ".tokens-0.locked-0123abcd.partial"
    leftover.mkdir()
    open_train(cached_config)
    assert not leftover.exists()


def assert_full_disk_error(ended: Any, cache: Path, entry: str) -> None:
    assert ended.status == 2, ended.err
    assert "Traceback" not in ended.err
    assert f"data.cache_dir: '{cache}' cannot be written to: " in ended.err
    assert not list(cache.glob(f"{entry}-*"))
    assert not list(cache.glob(".*.partial"))


@pytest.mark.parametrize(("entry", "size"), [("tokenizer", 8192), ("tokens", 61_440)])
def test_full_disk_exits_with_2(entry: str, size: int, tiny: dict[str, Any], tmp_path: Path) -> None:
    """Within the tokenizer, which Rust writes, and within the token files."""
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
    """The same error as that of a full disk, also for whoever is not root."""

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


# --- the index -------------------------------------------------------------------------------------------------------


def pair(folder: Path) -> Path:
    with IndexedWriter(folder / "t", np.uint16) as writer:
        writer.add([7, 8])
        writer.add([9])
    return folder / "t"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw[:-8] + (3).to_bytes(8, "little"), "document borders do not lead from 0 to 2"),
        (lambda raw: raw[:-24] + (1).to_bytes(8, "little") + raw[-16:], "document borders do not lead from 0 to 2"),
        (lambda raw: raw[:-16] + (5).to_bytes(8, "little") + raw[-8:], "document borders do not lead from 0 to 2"),
        (lambda raw: raw[:-32] + (2**63 - 2).to_bytes(8, "little") + raw[-24:], "points to byte"),
        (lambda raw: raw[:-32] + (3).to_bytes(8, "little") + raw[-24:], "offsets between two ids"),
    ],
)
def test_invalid_index_is_refused(change: Any, words: str, tmp_path: Path) -> None:
    """In users' own files, which have no hashes."""
    prefix = pair(tmp_path)
    damage(prefix.with_suffix(".idx"), change)
    with pytest.raises(DataError, match=words):
        IndexedTokens(prefix)


def test_oversized_bin_file_is_refused(tmp_path: Path) -> None:
    prefix = pair(tmp_path)
    damage(prefix.with_suffix(".bin"), lambda raw: raw + b"\0\0")
    with pytest.raises(DataError, match=r"8 bytes, of which t\.idx describes only 6"):
        IndexedTokens(prefix)


def test_missing_index_is_refused(tmp_path: Path) -> None:
    prefix = pair(tmp_path)
    prefix.with_suffix(".idx").unlink()
    with pytest.raises(DataError, match=r"t\.idx: cannot be read: No such file"):
        IndexedTokens(prefix)


def test_overlong_document_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.indexed._MAX_DOCUMENT_TOKENS", 5)
    with IndexedWriter(tmp_path / "t", np.uint16) as writer:
        writer.extend([1, 2, 3])
        with pytest.raises(DataError, match="more than 5 tokens in one document"):
            writer.extend([4, 5, 6])
