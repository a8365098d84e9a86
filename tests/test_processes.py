"""Processes read from /proc, compared with psutil."""

from __future__ import annotations

import os

import psutil
import pytest

from trainer.fault_tolerance.processes import process_stat

pytestmark = pytest.mark.fast


def test_process_stat_agrees_with_psutil() -> None:
    stat, known = process_stat(os.getpid()), psutil.Process()
    assert stat is not None
    assert (stat.parent, stat.session) == (known.ppid(), os.getsid(0))
    started = psutil.boot_time() + stat.start_ticks / os.sysconf("SC_CLK_TCK")
    assert started == pytest.approx(known.create_time(), abs=2)
    assert not stat.is_dead
    assert not stat.is_stopped


def test_process_stat_of_no_process_is_none() -> None:
    assert process_stat(2**22 + 1) is None
