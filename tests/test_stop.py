"""Stop requests: all ranks stop after the same step with their state saved, and resume exactly."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch.distributed import HashStore

from tests.configs import with_values
from tests.harness import RunningCommand, captured_messages, run_command, run_ranks, running_command
from tests.stop_jobs import Signal, stop_and_resume
from trainer import exit
from trainer.distributed import Launch, World
from trainer.errors import Preempted
from trainer.events import append_event, read_events
from trainer.fault_tolerance import StopAgreement, StopRequests, stop_agreement
from trainer.fault_tolerance.stop_requests import INTERRUPTED, StopRequest
from trainer.run_directory import RunDirectory

STEPS = 40

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data 2, ZeRO 1": (2, {"deepspeed__zero_optimization": {"stage": 1}, "checkpoint__asynchronous": True}),
    "tensor 2 x pipeline 2": (4, {"parallel__tensor": 2, "parallel__pipeline": 2}),
}
MATRIX_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data 2, ZeRO 0, accumulation": (2, {"deepspeed__train_batch_size": 16}),
    "data 2, ZeRO 3": (2, {"deepspeed__zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}),
    "tensor 2": (2, {"parallel__tensor": 2}),
    "pipeline 2": (2, {"parallel__pipeline": 2}),
    "data 2 x tensor 2, ZeRO 2": (4, {"parallel__tensor": 2, "deepspeed__zero_optimization": {"stage": 2}}),
}


@pytest.mark.parametrize("name", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.matrix) for name in MATRIX_LAYOUTS)])
def test_all_ranks_stop_after_the_same_step_and_resume_exactly(name: str, tiny: dict[str, Any], tmp_path: Path) -> None:
    world, values = (LAYOUTS | MATRIX_LAYOUTS)[name]
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
    signals = [Signal(rank, numbers[rank % 3], "training") for rank in range(world)]
    signals += [
        Signal(1, signal.SIGTERM, "save"),
        Signal(world - 1, signal.SIGTERM, "evaluation"),
        Signal(0, signal.SIGUSR1, "step 9"),
        Signal(1, signal.SIGINT, "step 14"),
    ]
    if name in LAYOUTS:
        signals = signals[-5:] if world == 2 else [signals[2], signals[-1]]
    config = with_values(
        tiny,
        training__max_steps=STEPS,
        training__log_every_steps=1,
        checkpoint__every_steps=10,
        evaluation__every_steps=15,
        **values,
    )
    asynchronous = values.get("checkpoint__asynchronous", False)
    results = run_ranks(stop_and_resume, world, config, signals, 1)
    unbroken = results[0][0]
    assert sorted(unbroken) == list(range(1, STEPS + 1))
    for number, sent in enumerate(signals):
        ranks = [stopped[number] for _, stopped in results]
        assert len({rank.step for rank in ranks}) == 1, [rank.step for rank in ranks]
        first, step = ranks[0], ranks[0].step
        assert 0 < step < STEPS
        if sent.during != "training":
            begun = {"save": 10, "evaluation": 15, "step 9": 9, "step 14": 14}[sent.during]
            assert step == begun + 1 or (sent.during == "save" and asynchronous and step > begun), (
                "one more step, no more"
            )
        assert first.saved[-1] == f"step-{step:08}"
        preempted = [event for event in first.events if event["event"] == "preempted"]
        cause = f"{sent.number.name} (rank {sent.rank})"
        assert [(event["step"], event["cause"]) for event in preempted] == [(step, cause)]
        assert "start the same command again" in first.message
        assert cause in first.message
        assert step not in first.evaluated, "an evaluation is not begun by a run that stops"
        assert [event["step"] for event in first.events if event["event"] == "save"].count(step) == 1
        assert first.losses == unbroken, "the resumed run computes what the unbroken one does"


def _wait(path_exists: Callable[[], bool], started: RunningCommand, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path_exists():
        assert time.monotonic() < deadline
        assert all(process.is_alive() for process in started.processes), started.errors()
        time.sleep(0.01)


def test_stop_before_the_first_step_exits_75(tiny: dict[str, Any], tmp_path: Path) -> None:
    """While data are prepared, and while ranks join and build the model; the same command trains afterwards."""
    documents = (json.dumps({"text": f"document {number} " * 40}) for number in range(20_000))
    (tmp_path / "large.jsonl").write_text("\n".join(documents))
    values = {"data__train": [{"path": str(tmp_path / "large.jsonl")}], "data__cache_dir": str(tmp_path / "cache")}
    (tmp_path / "config.json").write_text(json.dumps(with_values(tiny, **values)))
    command = ("launch/train.py", "--config", str(tmp_path / "config.json"))
    with running_command(*command) as started:
        _wait(lambda: any((tmp_path / "cache").glob("*partial*")), started)
        os.kill(started.processes[0].pid, signal.SIGTERM)
        assert started.statuses(10) == [75]
        assert "stopped before the first step: SIGTERM. Start the same command again" in started.errors()
    with running_command(*command) as started:
        _wait(lambda: (tmp_path / "run" / "logs").is_dir(), started)
        os.kill(started.processes[0].pid, signal.SIGINT)
        assert started.statuses(30) == [75]
    assert read_events(tmp_path / "run")[-1]["event"] == "preempted"
    assert run_command(*command).status == 0
    assert read_events(tmp_path / "run")[-1]["event"] == "finish"


def test_second_interrupt_exits_at_once(tiny: dict[str, Any], tmp_path: Path) -> None:
    """In a step that never ends; an interrupt within a second is the launcher's copy of the first."""
    assert run_ranks(_first_interrupt, 1, tmp_path) == [None]
    assert (tmp_path / "alive").read_text() == "after the copy"


def _first_interrupt(folder: Path) -> None:
    child = os.fork()
    if child == 0:
        requests = StopRequests()
        requests.install()
        requests.begin_training()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        (folder / "alive").write_text("after the copy")
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(20)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == INTERRUPTED


@pytest.mark.fast
@pytest.mark.parametrize(("seconds", "warns"), [(25.0, True), (3.0, False)])
def test_slow_saves_warn_at_the_start(seconds: float, warns: bool, tmp_path: Path) -> None:
    append_event(tmp_path, "save", attempt=1, step=5, seconds=seconds)
    requests = StopRequests()
    requests._directory = RunDirectory(tmp_path, 2, None)
    with captured_messages("trainer.fault_tolerance.stop_requests") as messages:
        requests._warn_about_slow_saves()
    assert any("the last checkpoint took 25 s" in message for message in messages) == warns


@pytest.mark.fast
@pytest.mark.parametrize("arrives", [True, False])
def test_rank_zero_hosts_the_store_until_all_ranks_have_read(
    arrives: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop_agreement, "_READ_TIMEOUT", timedelta(seconds=20.0 if arrives else 0.2))
    store, directory = HashStore(), RunDirectory(tmp_path, 1, None)
    stops = []
    for rank in (0, 1):
        world = SimpleNamespace(
            store=store, full_topology=SimpleNamespace(rank=rank, world_size=2), device=SimpleNamespace(type="cpu")
        )
        requests = StopRequests(rank)
        requests._request = StopRequest("SIGTERM", 0.0)
        stops.append(StopAgreement(requests, cast("World", world), directory, final_step=9))
        stops[rank].before_step(3)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(stops[0].preemption_error, 3)
        time.sleep(0.5)
        assert first.done() != arrives, "rank 0 waits for rank 1, but not for ever"
        if arrives:
            stops[1].preemption_error(3)
        assert "SIGTERM (rank 0)" in str(first.result(timeout=2))


@pytest.mark.fast
@pytest.mark.parametrize("rank", [0, 1])
def test_stop_exits_75_without_an_error(
    rank: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses: list[int] = []

    def leave(status: int) -> None:
        statuses.append(status)
        raise SystemExit(status)

    monkeypatch.setattr(exit, "_end_process", leave)
    with pytest.raises(SystemExit), exit.exit_on_errors(Launch(rank=rank, world_size=2)):
        raise Preempted("stopped after step 3: SIGTERM")
    assert statuses == [75]
    assert capsys.readouterr().err == ("" if rank else "[tessera] stopped after step 3: SIGTERM\n")
