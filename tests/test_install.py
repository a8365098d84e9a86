"""`make install`: every step is announced, nothing is compiled that the quickstart does not need."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tools import extensions
from trainer.config import load_config
from trainer.config.deepspeed import required_extensions

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parent.parent
JOINING = {"ShareMemCommBuilder"}
"""What every run on CPUs loads before it knows its optimizer."""


def recipe(target: str) -> list[str]:
    printed = subprocess.run(
        ["make", "-n", "VENV=/nowhere", target], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    return printed.stdout.splitlines()


def compiled(lines: list[str]) -> set[str]:
    return {name for line in lines if "tools.extensions" in line for name in re.findall(r"\w+Builder", line)}


def test_install_compiles_only_quickstart_extensions() -> None:
    needs = {
        name: set(required_extensions(load_config(ROOT / "ds_configs" / f"{name}.json").deepspeed_json))
        for name in ("quickstart", "quickstart-offload")
    }
    assert compiled(recipe("install")) == JOINING | needs["quickstart"]
    later = compiled(recipe("test")) - compiled(recipe("install"))
    assert later == needs["quickstart-offload"] - needs["quickstart"]
    assert set(extensions._PURPOSES) == compiled(recipe("test"))


def test_install_announces_long_steps() -> None:
    lines = [line for line in recipe("install") if line.strip()]
    long = [n for n, line in enumerate(lines) if re.search(r" -m (pip install|tools\.extensions|venv)", line)]
    assert len(long) == 4
    for number, place in enumerate(long, start=1):
        assert f"--- {number} of 4: " in lines[place - 1], lines[place]
        assert re.search(r"[Ss]econds|minute", lines[place - 1])
        assert " -q" not in lines[place], "pip shows what it does"


@pytest.mark.parametrize(
    ("missing", "words"),
    [("g++", "g++ is needed, to compile two extensions of DeepSpeed"), ("python", "Python 3.11 or later is needed")],
)
def test_missing_prerequisite_fails_before_download(missing: str, words: str, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sh", "make", "echo", "test", "touch"):
        (programs / name).symlink_to(shutil.which(name) or "/bin/false")
    (programs / "python3").symlink_to(sys.executable)
    old = tmp_path / "old"
    claim = "import sys; sys.version_info = (3, 10, 14);"
    old.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -c "{claim} $1"\n')
    old.chmod(0o755)
    if missing == "python":
        (programs / "g++").symlink_to("/bin/true")
    options = [f"VENV={tmp_path / 'venv'}", *([f"PYTHON={old}"] if missing == "python" else [])]
    ended = subprocess.run(
        ["make", "install", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PATH": str(programs)},
    )
    assert ended.returncode != 0
    assert words in ended.stdout + ended.stderr
    assert not (tmp_path / "venv").exists()


def test_compilation_reports_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def slow(builder: str) -> None:
        time.sleep(0.2)

    settings: dict[str, Any] = {"_SECONDS_BETWEEN_LINES": 0.05, "load_extension": slow, "local_device": lambda: "cpu"}
    for name, value in settings.items():
        monkeypatch.setattr(extensions, name, value)
    monkeypatch.setattr(sys, "argv", ["extensions", "FusedAdamBuilder", "CPUAdamBuilder"])
    extensions.main()
    out = capsys.readouterr().out
    assert out.index("FusedAdamBuilder (1 of 2): AdamW on CPUs; the quickstart") < out.index("ready after 0:00:00")
    assert "CPUAdamBuilder (2 of 2): AdamW of an offloaded optimizer" in out
    assert out.count("  still compiling, 0:00:00") >= 4
    monkeypatch.setattr(extensions, "local_device", lambda: "cuda")
    extensions.main()
    assert capsys.readouterr().out.startswith("nothing to compile: this machine has a GPU")
