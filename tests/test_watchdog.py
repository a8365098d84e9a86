"""The watchdog: which rank is named when ranks stop, die or are late, and how the others end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.configs import tiny_config, with_values
from tests.harness import CommandResult, run_command, run_ranks
from tests.training_jobs import load_job
from trainer.assembly import plan_model
from trainer.checkpoint.context import checkpoint_group
from trainer.distributed import JOIN_TIMEOUT, Launch, PhaseMark, Phases, joined_world
from trainer.engine import build_engine
from trainer.errors import RankLost
from trainer.events import read_events
from trainer.fault_tolerance.failures import is_collective_failure
from trainer.fault_tolerance.inspection import is_debugged, main_thread_location, process_state
from trainer.fault_tolerance.reports import STALE_ROUNDS, PeerReports, initial_report
from trainer.fault_tolerance.watchdog import PEER_CHECK_SECONDS, REPORT_SECONDS
from trainer.model import build_model
from trainer.topology import Topology

SCRIPT = str(Path(__file__).parent / "data" / "misbehaving_rank.py")
TRAIN = str(Path(__file__).parent.parent / "launch" / "train.py")
LIMIT = 4.0


@dataclass(frozen=True)
class Case:
    """Rank `rank` does `action` when it enters the phase `mark`."""

    mark: str
    action: str = "stop"
    rank: int = 1
    pipeline: int = 1
    limit: float = LIMIT


CASES = {
    "step": Case("step 3"),
    "step of a pipeline": Case("step 3", pipeline=2),  # waits in point-to-point operations
    "evaluation": Case("evaluate 2"),
    "save": Case("save 2"),
    "rank 0": Case("step 3", rank=0),  # the store does not answer
    "dead": Case("step 3", action="exit"),
    "dead before it has joined": Case("data 0", action="exit", rank=0),
    "late": Case("data 0", action="sleep"),
    "none": Case("nowhere", limit=60.0),  # lines from 3 s on, which a busy machine does not reach
}


@dataclass(frozen=True)
class Outcome:
    ended: CommandResult
    seconds: float
    """From the fault to the end of the first rank that ends."""

    told: float
    """From the fault to the first line about it in the log of a rank that is not the faulty one."""

    logs: dict[int, str]
    failures: list[dict[str, Any]]
    """Events."""

    @property
    def said(self) -> str:
        """Return True if a rank printed these words to standard error."""
        return "\n".join(self.ended.errors)


def _outcome(case: Case, config: dict[str, Any], folder: Path) -> Outcome:
    folder.mkdir()
    values: dict[str, Any] = {
        "run__output_dir": str(folder / "run"),
        "run__collective_timeout_seconds": case.limit,
        "parallel__pipeline": case.pipeline,
        "evaluation__every_steps": 2,
        "checkpoint__every_steps": 2,
    }
    (folder / "config.json").write_text(json.dumps(with_values(config, **values)))
    variables = {"AT": case.mark, "ACTION": case.action, "BAD_RANK": str(case.rank), "SINCE": str(folder / "since")}
    ended = run_command(SCRIPT, "--config", str(folder / "config.json"), world=2, environment=variables)
    since = float((folder / "since").read_text()) if (folder / "since").exists() else time.time()
    seconds = time.time() - since
    files = {rank: folder / "run" / "logs" / f"rank-{rank}.log" for rank in range(2)}
    logs = {rank: file.read_text() if file.exists() else "" for rank, file in files.items()}
    lines = [line for line in logs[1 - case.rank].splitlines() if "has taken" in line]
    told = float("inf")
    if lines:
        told = datetime.strptime(lines[0][:23], "%Y-%m-%d %H:%M:%S,%f").timestamp() - since
    failures = [event for event in read_events(folder / "run") if event["event"] == "failure"]
    return Outcome(ended, seconds, told, logs, failures)


@pytest.fixture(scope="module")
def outcomes(corpus: Path, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Run all cases concurrently, since most of their time is waiting."""
    folder = tmp_path_factory.mktemp("watchdog")
    config = tiny_config(corpus, shared_cache, folder)
    with ThreadPoolExecutor(4) as pool:
        work = {name: pool.submit(_outcome, case, config, folder / name) for name, case in CASES.items()}
        return {name: future.result() for name, future in work.items()}


@pytest.mark.parametrize("name", ["step", "step of a pipeline", "evaluation", "save", "rank 0"])
def test_stopped_rank_is_named_and_the_others_exit(name: str, outcomes: dict[str, Outcome]) -> None:
    case, outcome = CASES[name], outcomes[name]
    assert outcome.ended.status == RankLost.exit_status, outcome.said
    phase, step = case.mark.split()
    words = {"step": f"step {step}", "evaluate": f"evaluation at step {step}", "save": f"checkpoint of step {step}"}
    expected = f"{words[phase]}: a collective did not complete within {LIMIT:g} s (run.collective_timeout_seconds)"
    assert expected in outcome.said
    assert re.search(rf"not arrived: rank {case.rank} .*(is stopped|does not respond)", outcome.said), outcome.said
    assert outcome.told < LIMIT / 10 + 2, "the limit's tenth, and what a busy machine takes"
    assert LIMIT - 1 < outcome.seconds < LIMIT + 5
    assert 'File "' in outcome.logs[1 - case.rank], "the stacks of the rank that waits"


def test_flight_recorder_is_dumped_and_named(outcomes: dict[str, Outcome], tmp_path: Path) -> None:
    named = re.search(r"its collectives in (\S+)", outcomes["evaluation"].said)
    assert named is not None
    assert json.loads(Path(named[1]).read_text())["entries"]


def test_dead_rank_is_named(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["dead"]
    assert outcome.ended.status == RankLost.exit_status
    assert re.search(r"error: step 3: lost rank 1 \(host .*, last in .*, its process \d+ has died\)", outcome.said)
    assert "Traceback" not in outcome.said


def test_rank_zero_that_dies_before_joining_is_named(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["dead before it has joined"]
    assert outcome.ended.status == RankLost.exit_status
    assert "preparing data: lost rank 0 (" in outcome.said
    assert "Traceback" not in outcome.said


@pytest.mark.parametrize("name", ["step", "step of a pipeline", "evaluation", "save", "dead"])
def test_failure_event_names_the_rank(name: str, outcomes: dict[str, Outcome]) -> None:
    (failure,) = outcomes[name].failures
    assert failure["rank"] == 1
    assert failure["step"] == 2
    assert "rank 1 (host " in failure["cause"]


def test_late_rank_is_named_while_the_others_join(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["late"]
    assert outcome.ended.status == 0, outcome.said
    assert re.search(r"waited 0:00:0\d for rank 1 to prepare its data", outcome.ended.out)
    assert "timed out" not in outcome.said, "torch's own warnings"


def test_healthy_run_logs_nothing_about_waiting(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["none"]
    assert outcome.ended.status == 0, outcome.said
    line = r"world: 2 ranks on 1 host \(\S+\), pipeline 1 x data 2 x tensor 1, device CPU \(\d+ cores\)"
    assert len(re.findall(line, outcome.ended.out)) == 1
    for log in outcome.logs.values():
        assert "has taken" not in log
        assert 'File "' not in log


def test_stopped_rank_is_reported_within_30_s_at_the_default_limit() -> None:
    assert PEER_CHECK_SECONDS + (STALE_ROUNDS + 1) * REPORT_SECONDS <= 30


# Timeouts -------------------------------------------------------------------------------------------------------------


def _timeouts(config: dict[str, Any]) -> dict[str, list[set[float]]]:
    """Return the timeouts of this rank's process groups before the first step, in it, and in the second."""
    launch = Launch.from_environment()
    parallel = config["parallel"]
    topology = Topology.of(launch.world_size, launch.rank, tensor=parallel["tensor"], pipeline=parallel["pipeline"])
    phases = Phases(20.0)
    with joined_world(launch, topology, None, phases, seed=1) as world:
        loaded = load_job(config, launch.world_size)
        world.groups.tensor_subgroup(2)
        build_engine(build_model(loaded), loaded, world, plan_model(loaded).assignment)
        checkpoint_group()
        found: dict[str, list[float]] = {"before": _of_groups()}
        for name in ("resume", "first", "second"):
            phases.enter("resume" if name == "resume" else "step")
            found[name] = _of_groups()
    return found


def _of_groups() -> list[float]:
    import torch

    groups = list(dist.distributed_c10d._world.pg_map)
    options = [group._get_backend(torch.device("cpu")).options for group in groups]
    return [o._timeout.total_seconds() for o in options]


def test_process_groups_have_the_timeout_of_the_phase(tiny: dict[str, Any]) -> None:
    values = {"parallel__tensor": 2, "parallel__pipeline": 2, "deepspeed__zero_optimization": {"stage": 1}}
    for found in run_ranks(_timeouts, 8, with_values(tiny, **values)):
        assert len(found["second"]) >= 8, "the default, three axes, and those of DeepSpeed and of checkpoints"
        assert set(found["resume"]) == {JOIN_TIMEOUT.total_seconds()}
        assert set(found["first"]) == {600.0}, "kernels are compiled"
        assert set(found["second"]) == {20.0}
        assert len(set(found["before"])) > 1, "negative control: DeepSpeed's groups have a timeout of their own"


def test_first_step_and_first_evaluation_have_time_to_compile() -> None:
    phases = Phases(5.0)
    limits = []
    for phase in ("evaluate", "step", "step", "save", "evaluate", "step", "final"):
        phases.enter(phase)  # type: ignore[arg-type]
        limits.append(phases.timeout)
    assert limits == [600.0, 600.0, 5.0, 5.0, 5.0, 5.0, 5.0]
    phases = Phases(3600.0)
    phases.enter("step")
    assert phases.timeout == 3600.0


# Parts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_phase_mark_counts_phases_and_progress() -> None:
    phases = Phases()
    phases.enter("data")
    phases.enter("step", 7)
    phases.advance()
    assert phases.mark == PhaseMark(2, 1, "step", 7)
    phases.enter("save", 7)
    assert phases.mark == PhaseMark(3, 0, "save", 7)
    assert phases.mark.name == "checkpoint of step 7"


@pytest.mark.fast
def test_peer_reports_separate_lost_ranks_from_working_ranks() -> None:
    own = initial_report(Launch(0, 6, 0, 6))
    elsewhere = replace(own, host="b", namespace="another")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mark = PhaseMark(12, 0, "step", 12)
    peers = PeerReports(own, 6)
    silent = replace(elsewhere, rank=1).with_mark(mark)
    working = replace(elsewhere, rank=2).with_mark(mark)
    for number in range(STALE_ROUNDS + 1):
        peers.update(
            {
                0: own.with_mark(mark),
                1: silent,
                2: replace(working, waited=float(number)),
                3: replace(elsewhere, rank=3, error="full disk").with_mark(mark),
                4: replace(own, rank=4, pid=dead.pid, waited=float(number)).with_mark(
                    mark._replace(phase_index=11, step=11)
                ),
            }
        )
    lost_ranks = peers.lost_ranks()
    assert lost_ranks[1] == "does not respond"
    assert lost_ranks[3] == "failed: full disk"
    assert lost_ranks[4] == f"its process {dead.pid} has died"
    assert set(lost_ranks) == {1, 3, 4}
    assert peers.ranks_behind(12) == [4, 5]
    assert peers.describe([4, 5], lost_ranks) == (
        f"rank 4 (host {own.host}, last in step 11, its process {dead.pid} has died), rank 5 (not started)"
    )


@pytest.mark.fast
def test_process_state_follows_signals() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert process_state(child.pid) == "running"
        os.kill(child.pid, signal.SIGSTOP)
        deadline = time.monotonic() + 5
        while process_state(child.pid) != "stopped" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process_state(child.pid) == "stopped"
    finally:
        child.kill()
        child.wait()
    assert process_state(child.pid) == "dead"


@pytest.mark.fast
def test_main_thread_location_detects_collectives() -> None:
    location, in_collective = main_thread_location()
    assert "main_thread_location" in location or "test_watchdog.py" in location or "inspection.py" in location
    assert not in_collective
    assert not is_debugged() or sys.gettrace() is not None


@pytest.mark.fast
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:34697"), True),
        (RuntimeError("[unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation to complete"), True),
        (dist.DistNetworkError("The client socket has failed"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("timed out"), False),
    ],
)
def test_is_collective_failure_separates_other_errors(error: Exception, expected: bool) -> None:
    assert is_collective_failure(error) == expected
