"""The cache of token files: what makes an entry, and how damage is found and repaired."""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.configs import with_values
from tests.data_helpers import Change, contents, damage, flip, open_train, prepared, token_folder, zero
from tests.harness import run_command
from trainer.data import integrity, prepare
from trainer.data.cache import Cache
from trainer.errors import ConfigError, DataError

TRAIN = str(Path(__file__).parent.parent / "launch" / "train.py")

pytestmark = pytest.mark.fast


@pytest.fixture
def cached_config(tiny: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Return a configuration whose cache, used by no other test, has been built."""
    config = with_values(tiny, data__cache_dir=str(tmp_path / "cache"), data__validation=[])
    open_train(config)
    return config


def test_cache_entry_depends_on_content_not_file_name(tiny: dict[str, Any], tmp_path: Path) -> None:
    text = Path(tiny["data"]["train"][0]["path"]).read_bytes()
    (tmp_path / "copy.jsonl").write_bytes(text)
    cache = str(tmp_path / "cache")
    first = prepared(tiny, data__cache_dir=cache, data__validation=[])
    again = prepared(
        tiny, data__cache_dir=cache, data__validation=[], data__train=[{"path": str(tmp_path / "copy.jsonl")}]
    )
    assert first.train[0].bin_path == again.train[0].bin_path
    (tmp_path / "copy.jsonl").write_bytes(text + b'{"text": "more"}\n')
    other = prepared(
        tiny, data__cache_dir=cache, data__validation=[], data__train=[{"path": str(tmp_path / "copy.jsonl")}]
    )
    assert other.train[0].bin_path != first.train[0].bin_path
    without_end = prepared(tiny, data__cache_dir=cache, data__validation=[], data__special_tokens="none")
    assert without_end.train[0].tokens == first.train[0].tokens - len(first.train[0])


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
    name: str, change: Change, keep_time: bool, cached_config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    folder = token_folder(cached_config)
    expected = contents(folder)
    damage(folder / name, change, keep_time=keep_time)
    with caplog.at_level(logging.WARNING):
        open_train(cached_config)
    assert contents(folder) == expected
    (message,) = [r.getMessage() for r in caplog.records if "rebuilding cache entry" in r.getMessage()]
    assert str(folder) in message
    caplog.clear()
    open_train(cached_config)
    assert "rebuilding cache entry" not in caplog.text


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
    """Otherwise the cache would serve the new content under the hash of the old one to every later run."""
    old = Path(tiny["data"]["train"][0]["path"]).read_bytes()
    (tmp_path / "a.jsonl").write_bytes(old)
    train = [{"path": str(tmp_path / "a.jsonl")}]
    config = with_values(tiny, data__cache_dir=str(tmp_path / "cache"), data__validation=[], data__train=train)
    read = getattr(prepare, reader)

    def read_while_growing(*arguments: object, **options: object) -> None:
        with (tmp_path / "a.jsonl").open("ab") as file:
            file.write(b'{"text": "one more document"}\n')
        read(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(prepare, reader, read_while_growing)
        with pytest.raises(DataError, match=r"a\.jsonl: changed while it was read"):
            open_train(config)
    num_documents = len(open_train(config))
    (tmp_path / "a.jsonl").write_bytes(old)
    assert len(open_train(config)) == num_documents - 1


def test_undamaged_entry_is_not_rebuilt(cached_config: dict[str, Any]) -> None:
    before = {p: p.stat().st_ino for p in token_folder(cached_config).iterdir()}
    open_train(cached_config)
    open_train(cached_config, verify_data=True)
    assert {p: p.stat().st_ino for p in token_folder(cached_config).iterdir()} == before


def large_entry(folder: Path, blocks: int) -> Path:
    """Create an entry of many blocks of 1 KiB."""
    folder.mkdir()
    (folder / "tokens.bin").write_bytes(random.Random(3).randbytes(1024 * blocks))
    integrity.seal(folder)
    return folder


def test_full_verification_finds_what_sampling_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start verifies the first block, the last, and a random sample; `--verify_data` verifies all."""
    monkeypatch.setattr(integrity, "BLOCK_BYTES", 1024)
    folder = large_entry(tmp_path / "e", 100)
    for offset in (0, 99 * 1024):
        damage(folder / "tokens.bin", flip(offset))
        assert "hash mismatch in block" in str(integrity.find_damage(folder, blocks=2))
        damage(folder / "tokens.bin", flip(offset))
    damage(folder / "tokens.bin", flip(50 * 1024))
    num_detections = sum(integrity.find_damage(folder, blocks=22) is not None for _ in range(300))
    assert 300 * 20 / 98 * 0.5 < num_detections < 300 * 20 / 98 * 1.6, "20 random blocks of 98 each time"
    assert integrity.find_damage(folder, blocks=None) == "tokens.bin: hash mismatch in block 50 (at byte 51,200)"


def test_damage_in_sampled_block_is_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the samples of later calls miss the damage."""
    samples: list[int] = []

    def select_blocks(count: int, blocks: int | None) -> Iterable[int]:
        if blocks is None:
            return range(count)
        samples.append(blocks)
        return [50] if len(samples) == 1 else [0]

    def build(folder: Path) -> None:
        (folder / "tokens.bin").write_bytes(random.Random(3).randbytes(1024 * 100))

    monkeypatch.setattr(integrity, "BLOCK_BYTES", 1024)
    monkeypatch.setattr(integrity, "_select_blocks", select_blocks)
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


def test_build_reads_back_every_block(tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that does not return what was written ends the run with status 2 and leaves no entry."""
    drop_cached_pages = integrity.drop_cached_pages

    def failing_disk(path: Path) -> None:
        drop_cached_pages(path)
        if path.name == "tokens.bin":
            damage(path, flip(777))

    monkeypatch.setattr(integrity, "drop_cached_pages", failing_disk)
    config = with_values(tiny, data__cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"data\.cache_dir: .*does not return what was written: tokens\.bin"):
        open_train(config)
    assert not list((tmp_path / "cache").glob("tokens-*"))


def test_build_syncs_before_rename(tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        calls.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        calls.append(("rename", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    config = with_values(tiny, data__cache_dir=str(tmp_path / "cache"), data__validation=[])
    open_train(config)
    folder = token_folder(config)
    commit = calls.index(("rename", str(folder)))
    synced_before = [Path(path) for call, path in calls[:commit] if call == "sync"]
    partial = next(path.parent for path in synced_before if path.name == "tokens.bin")
    assert {partial / "tokens.bin", partial / "tokens.idx", partial} <= set(synced_before)
    assert ("sync", str(folder.parent)) in calls[commit:]


def test_entry_without_hashes_is_rebuilt_once(cached_config: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """It cannot be verified, so token files are rebuilt; a tokenizer is kept and hashed as it is."""
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
    """The rebuilt token files have the same fingerprint, so the run does not refuse them as different data."""
    config = with_values(
        tiny,
        data__cache_dir=str(tmp_path / "cache"),
        data__validation=[],
        training__max_steps=2,
        checkpoint={"every_steps": 1},
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    first = run_command(TRAIN, "--config", str(tmp_path / "config.json"))
    assert first.status == 0, first.err
    folder = token_folder(config)
    damage(folder / "tokens.bin", zero(0, 4000))
    resumed = run_command(TRAIN, "--config", str(tmp_path / "config.json"), "--set", "training.max_steps=3")
    assert resumed.status == 0, resumed.err
    assert "rebuilding cache entry" in resumed.err + resumed.out
    damage(folder / "tokens.bin", flip(5000))
    flagged = ("--verify_data", "--set", "training.max_steps=4")
    verified = run_command(TRAIN, "--config", str(tmp_path / "config.json"), *flagged)
    assert verified.status == 0, verified.err
    assert "rebuilding cache entry" in verified.err + verified.out
