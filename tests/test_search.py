"""Searches for files are bounded, and files that are not regular are refused."""

from __future__ import annotations

import glob
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.configs import with_values
from tests.harness import run_command
from trainer.config import file_search
from trainer.config.file_search import search_folder, search_glob
from trainer.config.load import check_config, load_config
from trainer.config.paths import matching_files, path_problems
from trainer.data import load_tokenizer
from trainer.errors import ConfigError

pytestmark = pytest.mark.fast

TRAIN = str(Path(__file__).parent.parent / "launch" / "train.py")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("a.jsonl", "b/c.jsonl", "b/d/e.jsonl", "b/d/f.txt", ".hidden/g.jsonl", "b/.h.jsonl", "x[1].jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "link").symlink_to("b")
    return tmp_path


@pytest.mark.parametrize(
    "pattern",
    [
        "*.jsonl",
        "*/*.jsonl",
        "**/*.jsonl",
        "**",
        "b/**",
        "**/d/*",
        "b/**/e.jsonl",
        "**/**/*.txt",
        "?.jsonl",
        "*/d/e.*",
        ".hidden/*",
        "b/.*",
        "x[[]1].jsonl",
        "nowhere/*",
        "**/nothing",
        "link/*.jsonl",
        "[ab].jsonl",
    ],
)
def test_glob_matches_like_python(pattern: str, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    for start in ("", f"{tree}/"):
        expected = sorted({Path(p) for p in glob.glob(start + pattern, recursive=True) if os.path.isfile(p)})
        assert search_glob(Path(start + pattern)) == expected


def test_symlink_loop_is_visited_once(tree: Path) -> None:
    (tree / "b" / "up").symlink_to("..")
    found = search_glob(tree / "**" / "e.jsonl")
    assert tree / "b" / "d" / "e.jsonl" in found
    assert len(found) < 10
    assert len(search_folder(tree)) == 7


def test_search_is_bounded(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_search, "MAX_SEARCHED_ENTRIES", 3)
    for path in (str(tree), f"{tree}/**"):
        (problem,) = path_problems("data.train.0.path", path)
        assert "exceeds" in problem.reason
        assert matching_files(path) == []


@pytest.mark.parametrize("path", ["/proc/**", "/proc/**/*.jsonl", "/proc", "/proc/self/status", "/sys/**/*.txt"])
def test_virtual_file_system_is_refused(path: str) -> None:
    (problem,) = path_problems("data.train.0.path", path)
    assert "is in a virtual file system" in problem.reason


def test_search_skips_virtual_file_systems() -> None:
    assert search_glob(Path("/pro[c]/*")) == []


def test_special_file_as_data_exits_with_2(tiny: dict[str, Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    os.mkfifo(tmp_path / "t.idx")
    (tmp_path / "t.bin").write_bytes(b"xx")
    (tmp_path / "device.txt").symlink_to("/dev/zero")
    for name, kind in (("pipe.jsonl", "a named pipe"), ("t.bin", "a named pipe"), ("device.txt", "a device")):
        config = with_values(tiny, data__train=[{"path": str(tmp_path / name)}], data__validation=[])
        with pytest.raises(ConfigError, match=rf"data\.train\.0\.path: .* is {kind}"):
            check_config(config, world_size=1, device="cpu")
    (tmp_path / "a.txt").write_text("text")
    assert [f.name for f in matching_files(f"{tmp_path}/*.*")] == ["a.txt", "t.bin"], "a glob leaves them out"


def test_named_pipe_as_data_is_refused(tiny: dict[str, Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    config = with_values(tiny, data__train=[{"path": str(tmp_path / "pipe.jsonl")}], data__validation=[])
    (tmp_path / "config.json").write_text(json.dumps(config))
    ended = run_command(TRAIN, "--config", str(tmp_path / "config.json"))
    assert (ended.status, "is a named pipe" in ended.err) == (2, True), ended.err


def test_special_file_as_configuration_is_refused(tiny: dict[str, Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "config.json").write_text(json.dumps({**tiny, "deepspeed": "pipe.json"}))
    (tmp_path / "child.json").write_text(json.dumps({"extends": "pipe.json"}))
    for name in ("pipe.json", "config.json", "child.json"):
        with pytest.raises(ConfigError, match=r"pipe\.json: is a named pipe\. Use a regular file"):
            load_config(tmp_path / name)
    for path, kind in (("/dev/zero", "a device"), ("/proc/uptime", "in a virtual file system")):
        with pytest.raises(ConfigError, match=f"{path}: is {kind}"):
            load_config(path)


def test_special_file_in_model_folder_is_refused(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny["model"]["config"]))
    os.mkfifo(folder / "model.safetensors")
    config = with_values(tiny, model={"path": str(folder)})
    with pytest.raises(ConfigError, match=r"model\.path: '.*model\.safetensors' is a named pipe"):
        check_config(config, world_size=1, device="cpu")
    (folder / "model.safetensors").unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(folder)
        listener.bind("tokenizer.json")
        with pytest.raises(ConfigError, match=r"data\.tokenizer: '.*tokenizer\.json' is a socket"):
            load_tokenizer(str(folder), "data.tokenizer")
