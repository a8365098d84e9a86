"""Detection of the processes that started a rank, and of their death."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from trainer.errors import ConfigError
from trainer.fault_tolerance import ancestors, hostfile
from trainer.fault_tolerance.ancestors import Ancestors, Process, ProcessWatch, find_ancestors, read_process
from trainer.fault_tolerance.processes import ProcessStat

ONE_HOST = "--world_info=" + base64.urlsafe_b64encode(json.dumps({"localhost": [0]}).encode()).decode()
RUNNER = ("/env/bin/python", "/env/bin/deepspeed", "--num_gpus", "2", "launch/train.py")
LAUNCHER = (
    "/env/bin/python3.12",
    "-u",
    "-m",
    "deepspeed.launcher.launch",
    ONE_HOST,
    "--master_port=29500",
    "--enable_each_rank_log=None",
    "--log_level=info",
    "launch/train.py",
)
REMOTE = (*LAUNCHER[:5], "--node_rank=1", *LAUNCHER[5:])
SHELL = ("-bash",)
SSHD = ("sshd-session: user@notty",)
INIT = ("/sbin/init",)


@pytest.fixture(autouse=True)
def _hangup_is_not_ignored() -> Iterator[None]:
    """Restore the default action of SIGHUP, which `nohup` around the tests would ignore."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def lineage_of(*commands: tuple[str, ...], sessions: tuple[int, ...] = ()) -> list[Process]:
    """Make ancestors with these commands, nearest first."""
    own = os.getsid(0)
    sessions = sessions or (own,) * len(commands)
    return [Process(100 - n, ProcessStat("S", 99 - n, sessions[n], n), command) for n, command in enumerate(commands)]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("commands", "watched", "missing"),
    [
        ((LAUNCHER, RUNNER, SHELL, INIT), 2, None),
        ((("numactl", "-m", "0"), LAUNCHER, RUNNER, SHELL), 3, None),
        ((("python", "/env/bin/torchrun", "--nproc_per_node", "2"), SHELL, INIT), 1, None),
        ((("python", "-m", "torch.distributed.run"), SHELL, INIT), 1, None),
        ((("python", "-X", "dev", "-m", "deepspeed.launcher.runner"), SHELL, INIT), 1, None),
        ((REMOTE, SHELL, SSHD, ("sshd: /usr/sbin/sshd -D",), INIT), 3, None),
        ((REMOTE, SSHD, INIT, RUNNER), 2, None),
        ((SHELL, SSHD, RUNNER), 0, None),
        ((SHELL, ("tmux",), INIT), 0, None),
        ((("python", "-c", "deepspeed.launcher.runner"), INIT), 0, None),
        ((LAUNCHER, INIT), 1, "deepspeed"),
        ((REMOTE, INIT), 1, None),
        ((LAUNCHER[:6], SHELL, INIT), 1, None),
    ],
)
def test_find_ancestors_returns_the_launcher_processes(
    commands: tuple[tuple[str, ...], ...], watched: int, missing: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = lineage_of(*commands)
    monkeypatch.setattr(ancestors, "_read_lineage", lambda: (line, True))
    found = find_ancestors()
    assert found.processes == tuple(line[:watched])
    assert found.missing == missing


@pytest.mark.fast
def test_find_ancestors_excludes_a_detached_session(monkeypatch: pytest.MonkeyPatch) -> None:
    line = lineage_of(REMOTE, SHELL, SSHD, INIT)
    monkeypatch.setattr(ancestors, "_read_lineage", lambda: (line, True))
    assert len(find_ancestors().processes) == 3
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert len(find_ancestors().processes) == 1
    finally:
        signal.signal(signal.SIGHUP, before)
    line[:] = lineage_of(REMOTE, SHELL, SSHD, INIT, sessions=(1, 1, 2, 0))
    assert len(find_ancestors().processes) == 1, "a rank in a session of its own"


@pytest.mark.fast
def test_find_ancestors_reports_a_launcher_that_died_during_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ancestors, "_read_lineage", lambda: (lineage_of(INIT), True))
    monkeypatch.delenv("CROSS_RANK", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert find_ancestors().missing is None
    monkeypatch.setenv("CROSS_RANK", "0")
    # The tests may run in a container whose first process belongs to a session outside of it.
    monkeypatch.setattr(ancestors.os, "getpgrp", lambda: 1)
    monkeypatch.setattr(ancestors.os, "getsid", lambda pid: 1)
    assert find_ancestors().missing == "the launcher"
    monkeypatch.setattr(ancestors.os, "getpgrp", lambda: 0)
    assert find_ancestors().missing is None, "the launcher is outside of this container"


@pytest.mark.fast
@pytest.mark.parametrize("has_descriptors", [True, False])
def test_process_watch_reports_each_death_once(has_descriptors: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_descriptors:
        monkeypatch.delattr(os, "pidfd_open")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    process = read_process(child.pid)
    assert process is not None
    used_again = replace(process, stat=process.stat._replace(start_ticks=process.stat.start_ticks - 1))
    watched = ProcessWatch([process])
    assert watched.needs_polling != has_descriptors
    assert watched.pop_dead() == []
    assert ProcessWatch([used_again]).pop_dead() == [used_again], "another process has its id"
    child.kill()
    deadline = time.monotonic() + 10
    dead: list[Process] = []
    while not dead and time.monotonic() < deadline:
        time.sleep(0.02)
        dead = watched.pop_dead(list(watched.descriptors) if (read_process(child.pid) or process).stat.is_dead else [])
    assert dead == [process], "although nobody has waited for it"
    assert watched.pop_dead() == []
    child.wait()


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "hosts", "is_refused"),
    [
        (("--hostfile", "{}/missing"), ["localhost"], True),
        (("--hostfile={}/missing", "--num_gpus", "2"), ["localhost"], True),
        (("-H", "{}/missing"), ["localhost"], True),
        (("-H", "{}/hosts"), ["localhost"], False),
        (("--hostfile", "{}/missing"), ["worker-1"], False),
        (("--num_gpus", "2"), ["localhost"], False),
        (("launch/train.py", "--hostfile", "{}/missing"), ["localhost"], False),
    ],
)
def test_missing_hostfile_is_refused(
    options: tuple[str, ...], hosts: list[str], is_refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    words = [word.format(tmp_path) for word in options]
    encoded = base64.urlsafe_b64encode(json.dumps({host: [0] for host in hosts}).encode()).decode()
    runner = Process(
        os.getpid(), ProcessStat("S", 1, 1, 0), ("python", "/env/bin/deepspeed", *words, "launch/train.py")
    )
    launcher = Process(2, ProcessStat("S", 1, 1, 0), (*LAUNCHER[:4], f"--world_info={encoded}"))
    monkeypatch.setattr(hostfile, "find_ancestors", lambda: Ancestors((launcher, runner)))
    if not is_refused:
        hostfile.refuse_missing_hostfile("launch/train.py")
        return
    with pytest.raises(ConfigError, match=f"--hostfile: {tmp_path}/missing is not a file"):
        hostfile.refuse_missing_hostfile("launch/train.py")
