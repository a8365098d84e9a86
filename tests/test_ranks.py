"""Commands on several forked processes end as under a launcher."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from tools.ranks import run_command, time_limit


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "script.py"


def test_command_status_is_of_first_failing_rank(script: Path) -> None:
    script.write_text("import os, sys, time\nos.environ['RANK'] == '1' and sys.exit(7)\ntime.sleep(60)\n")
    start = time.monotonic()
    assert run_command(str(script), world=2).status == 7
    assert time.monotonic() - start < 30


def test_hanging_ranks_are_killed(script: Path) -> None:
    script.write_text("import time\ntime.sleep(60)\n")
    before = set(psutil.Process().children(recursive=True))
    with time_limit(1.0), pytest.raises(AssertionError, match="still running after"):
        run_command(str(script), world=2)
    running = [p for p in psutil.Process().children(recursive=True) if p not in before and p.status() != "zombie"]
    assert not [p for p in running if "--multiprocessing-fork" in " ".join(p.cmdline())]
