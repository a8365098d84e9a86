"""Stop requests, watchdog, run lock, checkpoints and events in combination."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch.distributed import HashStore

from launch.train import train
from tests.commands import TRAIN
from tests.configs import with_values
from tests.harness import captured_messages, run_ranks, running_command
from tests.training_jobs import job_topology, load_job
from trainer.assembly import assemble
from trainer.checkpoint import saver, writer
from trainer.distributed import Launch, PhaseMark, Phases, joined_world
from trainer.errors import DataError, Preempted, TrainingHalted
from trainer.events import read_events
from trainer.fault_tolerance import StopAgreement, StopRequests, run_lock, watchdog
from trainer.fault_tolerance.diagnosis import Diagnosis
from trainer.fault_tolerance.inspection import is_debugged
from trainer.fault_tolerance.reports import Reporter
from trainer.fault_tolerance.run_lock import RunLock
from trainer.fault_tolerance.watchdog import Watchdog
from trainer.loop import fit
from trainer.model import export
from trainer.run_directory import RunDirectory
from trainer.run_layout import LOCK
from trainer.tracking.interface import Trackers

# Stop requests --------------------------------------------------------------------------------------------------------


def test_rank_waiting_for_rank_zero_can_be_stopped(tiny: dict[str, Any], tmp_path: Path) -> None:
    """Also by SIGINT, which Python does not see before torch's connection to the store times out."""
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    with socket.socket() as rank_0:
        rank_0.bind(("127.0.0.1", 0))
        rank_0.listen()
        rank_0.settimeout(60)
        variables = {
            "RANK": "1",
            "LOCAL_RANK": "1",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(rank_0.getsockname()[1]),
        }
        with running_command(TRAIN, "--config", str(tmp_path / "config.json"), environment=variables) as started:
            connection, _ = rank_0.accept()
            with connection:
                os.kill(started.processes[0].pid, signal.SIGINT)
                assert started.statuses(10) == [75], started.errors()


def _stopped_in_final(config: dict[str, Any]) -> tuple[str, str]:
    """Return the last event and the lock file of a run that receives SIGTERM while it writes its final model."""
    write_text = export._write_text

    def writing(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        write_text(*arguments, **options)

    export._write_text = writing
    requests = StopRequests()
    requests.install()
    train(load_job(config, 1), Launch(), requests)
    assert requests.request is not None
    run = Path(config["run"]["output_dir"])
    assert (run / "final" / "model.safetensors").is_file()
    return read_events(run)[-1]["event"], (run / LOCK).read_text()


def test_stop_during_the_final_model_lets_the_run_finish(tiny: dict[str, Any]) -> None:
    assert run_ranks(_stopped_in_final, 1, with_values(tiny, data__validation=[])) == [("finish", "")]


# Progress that the watchdog sees --------------------------------------------------------------------------------------


def _count_progress(config: dict[str, Any], slow: float = 0.0) -> Counter[str]:
    """Count the progress of this rank by phase, over two steps with one evaluation and one save."""
    found: Counter[str] = Counter()
    advance, write_chunks = Phases.advance, writer.write_chunks

    def counted(self: Phases) -> None:
        found[self.mark.phase] += 1
        advance(self)

    def slowly(*arguments: Any) -> Any:
        time.sleep(slow)
        return write_chunks(*arguments)

    Phases.advance, writer.write_chunks = counted, slowly  # type: ignore[method-assign]
    saver._PROGRESS_SECONDS = 0.05
    launch = Launch.from_environment()
    with joined_world(launch, job_topology(config, launch), seed=1) as world:
        trainer = assemble(load_job(config, launch.world_size), world)
        trainer.directory.path.mkdir(parents=True, exist_ok=True)
        stop = StopAgreement(StopRequests(launch.rank), world, trainer.directory, final_step=trainer.loaded.steps)
        fit(trainer, Trackers({}), stop)
    return found


@pytest.mark.parametrize("pipeline", [1, 2])
def test_phases_advance_by_micro_batch_and_file(pipeline: int, tiny: dict[str, Any]) -> None:
    values = {"training__max_steps": 2, "evaluation__max_batches": 3, "parallel__pipeline": pipeline}
    for found in run_ranks(_count_progress, pipeline, with_values(tiny, **values)):
        assert found["evaluate"] >= 2 * 3, "evaluations at step 0 and at the last"
        assert found["step"] >= 2
        assert found["save"] == 2, "one file is written, and verified"


def test_phases_advance_by_file_while_waiting_for_an_asynchronous_save(tiny: dict[str, Any]) -> None:
    """In the last save the watchdog would otherwise end a rank that waits for its own thread."""
    values = {"training__max_steps": 2, "checkpoint__asynchronous": True, "data__validation": []}
    (found,) = run_ranks(_count_progress, 1, with_values(tiny, **values), 0.5)
    assert found["save"] >= 1


def _one_rank(folder: Path) -> Watchdog:
    return Watchdog(Launch(), HashStore(), 1.0, RunDirectory(folder, 1, None))


@pytest.mark.fast
def test_watchdog_spares_a_rank_in_a_debugger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    namespace: dict[str, Any] = {"__name__": "pdb", "is_debugged": is_debugged}
    exec("found = is_debugged()", namespace)
    assert namespace["found"]
    watching, statuses = _one_rank(tmp_path), list[int]()
    reporter = SimpleNamespace(
        peers=SimpleNamespace(lost_ranks=dict, ranks_behind=lambda _: [], describe=str, reports=dict), reads_peers=False
    )
    diagnosis = Diagnosis(Launch(), cast("Reporter", reporter), 0.1)
    watching._seconds_waited = 100.0
    monkeypatch.setattr(watchdog.os, "_exit", statuses.append)
    for debugged, expected in ((True, []), (False, [6])):
        monkeypatch.setattr(watchdog, "is_debugged", lambda debugged=debugged: debugged)
        watching._handle_timeout(diagnosis, PhaseMark(1, 0, "step", 3), 1.0)
        assert statuses == expected


# Failures -------------------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize("error", [DataError("a.jsonl: line 3"), TrainingHalted("step 3"), ValueError("a bug")])
def test_watchdog_records_a_failure(error: Exception, tmp_path: Path) -> None:
    watching = _one_rank(tmp_path)
    watching.phases.enter("step", 3)
    with pytest.raises(type(error)), watching.explain_failures():
        raise error
    (event,) = read_events(tmp_path)
    assert (event["event"], event["step"], event["rank"], event["host"]) == ("failure", 2, 0, socket.gethostname())
    assert event["cause"] == str(error)


@pytest.mark.fast
def test_watchdog_records_no_failure_for_a_stop(tmp_path: Path) -> None:
    with pytest.raises(Preempted), _one_rank(tmp_path).explain_failures():
        raise Preempted("stopped")
    assert read_events(tmp_path) == []


# The lock -------------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_stop_during_release_writes_to_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of a closed descriptor is reused by the next file."""
    lock, close, opened = RunLock.acquire(tmp_path / "run"), os.close, list[int]()

    def closing(descriptor: int) -> None:
        close(descriptor)
        opened.append(os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT))
        (thread := threading.Thread(target=lock.mark_stopping)).start()
        thread.join(0.3)

    monkeypatch.setattr(run_lock.os, "close", closing)
    with captured_messages("trainer.fault_tolerance.run_lock") as messages:
        lock.release()
    monkeypatch.undo()
    assert (tmp_path / "other").read_bytes() == b""
    assert (tmp_path / "run" / LOCK).read_bytes() == b""
    assert messages == []
    close(opened[0])
