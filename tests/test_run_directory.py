"""Run directories that are damaged, incomplete, misplaced, or on a full disk: no silent loss, no traceback."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import signal
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from launch.train import train
from tests.commands import TRAIN, read_rows
from tests.configs import with_values
from tests.harness import CommandResult, captured_messages, get_free_port, run_command, run_ranks
from trainer import checkpoint_format
from trainer.checkpoint import CheckpointSaver
from trainer.checkpoint_format import read_manifest, verify_files, write_safetensors
from trainer.config.earlier_versions import stored_run
from trainer.config.load import check_config
from trainer.distributed import Launch, configure_logging
from trainer.distributed.logs import _RankFileHandler
from trainer.errors import ConfigError
from trainer.events import EVENTS, append_event, read_events
from trainer.fault_tolerance import StopRequests
from trainer.files import replace_folder, replace_text
from trainer.final_model import find_damage
from trainer.run_layout import layout_problems
from trainer.tracking.jsonl import JsonLines

DEEP = "[" * 100_000


def start(tiny: dict[str, Any], folder: Path, *arguments: str, world: int = 1, **values: Any) -> CommandResult:
    path = folder / "config.json"
    path.write_text(json.dumps(with_values(tiny, **{"checkpoint__every_steps": 2, **values})))
    return run_command(TRAIN, "--config", str(path), *arguments, world=world)


def mark_interrupted(run: Path) -> None:
    """Turn a finished run into one that was killed after its last save."""
    stored = json.loads((run / "config.json").read_text())
    stored["tessera"].update(finished_step=None, final=[])
    (run / "config.json").write_text(json.dumps(stored))
    shutil.rmtree(run / "final")


@pytest.fixture(scope="module")
def finished(corpus: Path, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run four steps, with checkpoints after the second and the fourth."""
    from tests.configs import tiny_config

    folder = tmp_path_factory.mktemp("finished")
    ended = start(tiny_config(corpus, shared_cache, folder / "run"), folder)
    assert ended.status == 0, ended.err
    return folder / "run"


@pytest.fixture
def run(finished: Path, tiny: dict[str, Any]) -> Path:
    """Copy the finished run to the output directory of `tiny`."""
    path = Path(tiny["run"]["output_dir"])
    shutil.copytree(finished, path)
    return path


# Lost checkpoints -----------------------------------------------------------------------------------------------------


def test_lost_checkpoints_are_refused(run: Path, tiny: dict[str, Any], tmp_path: Path) -> None:
    mark_interrupted(run)
    shutil.rmtree(run / "checkpoints")
    lost = start(tiny, tmp_path)
    assert lost.status == 4, lost.out
    assert "no checkpoint found, but the run has saved step 4" in lost.err
    assert "--resume never" in lost.err
    restarted = start(tiny, tmp_path, "--resume", "never", training__max_steps=2)
    assert restarted.status == 0, restarted.err
    assert start(tiny, tmp_path).status == 0, "resumes from its own checkpoint"


def train_until_killed_at_first_save(config: dict[str, Any]) -> None:
    CheckpointSaver.save = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    launch = Launch.from_environment()
    train(check_config(config, world_size=launch.world_size, device="cpu"), launch, StopRequests(launch.rank))


def test_run_killed_before_first_save_restarts(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = with_values(tiny, checkpoint__every_steps=2)
    with pytest.raises(AssertionError, match="exited without a result"):
        run_ranks(train_until_killed_at_first_save, 1, config)
    ended = start(tiny, tmp_path)
    assert ended.status == 0, ended.err
    assert "starting again at step 1" in ended.out
    rows = [(row["attempt"], row["step"]) for row in read_rows(tmp_path / "run") if row["split"] == "train"]
    assert rows == [(1, 1), (1, 2), (2, 1), (2, 2), (2, 4)]
    assert "starting again" not in start(tiny, tmp_path, run__output_dir=str(tmp_path / "new")).out


# The final model ------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "file"),
    [(truncate, "model.safetensors"), (flip, "model.safetensors"), (Path.unlink, "config.json")],
)
def test_damaged_final_model_is_rewritten(
    damage: Callable[[Path], None], file: str, run: Path, tiny: dict[str, Any], tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in (run / "final").iterdir()}
    damage(run / "final" / file)
    (run / "final" / "notes.txt").write_text("of the user")
    ended = start(tiny, tmp_path)
    assert ended.status == 0, ended.err
    assert f"final/{file}" in ended.out
    assert "rewriting the model of the finished run from its last checkpoint" in ended.out
    assert {path.name: path.read_bytes() for path in (run / "final").iterdir()} == before
    again = start(tiny, tmp_path)
    assert "finished at step 4" in again.out
    assert "resum" not in again.out
    assert len(read_rows(run)) == 5, "no step was trained again"


def test_damaged_final_model_is_rewritten_in_another_layout(run: Path, tiny: dict[str, Any], tmp_path: Path) -> None:
    before = {name: weight.clone() for name, weight in load_file(run / "final" / "model.safetensors").items()}
    truncate(run / "final" / "model.safetensors")
    ended = start(tiny, tmp_path, world=2, parallel__tensor=2)
    assert ended.status == 0, ended.err
    after = load_file(run / "final" / "model.safetensors")
    assert [name for name, weight in before.items() if not after[name].equal(weight)] == []


def test_damaged_final_model_without_checkpoint_exits_4(run: Path, tiny: dict[str, Any], tmp_path: Path) -> None:
    truncate(run / "final" / "model.safetensors")
    shutil.rmtree(run / "checkpoints")
    (run / EVENTS).unlink()
    ended = start(tiny, tmp_path)
    assert ended.status == 4, ended.out
    assert "no checkpoint found, but the run has finished at step 4" in ended.err
    assert (run / "final").is_dir()


@pytest.mark.fast
def test_final_model_of_earlier_version_is_checked_by_structure(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", [("a", torch.ones(4, 4))])
    (tmp_path / "config.json").write_text("{}")
    for recorded in (None, [], [{"name": 3}], 7, [{"name": "../config.json", "bytes": 2, "hash": "x"}]):
        assert find_damage(tmp_path, recorded) == ""
    truncate(tmp_path / "model.safetensors")
    assert "model.safetensors: expected" in find_damage(tmp_path, None)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    assert "cannot be read" in find_damage(tmp_path, None)
    (tmp_path / "model.safetensors.index.json").write_text(DEEP)
    assert "cannot be read" in find_damage(tmp_path, None)
    assert "is missing" in find_damage(tmp_path / "absent", None)


def test_final_model_mode_follows_umask(finished: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (finished / "final").iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}, modes


@pytest.mark.fast
def test_replace_folder_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the process ends between the two renames: the new folder still exists."""
    for name in ("final", ".final.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    rename = os.rename

    def fails(source: Any, target: Any) -> None:
        if Path(source).name == ".final.partial":
            raise OSError(errno.EIO, "broken")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="broken"):
        replace_folder(tmp_path / ".final.partial", tmp_path / "final")
    monkeypatch.undo()
    assert (tmp_path / "final" / "final").exists(), "the old folder is restored"
    replace_folder(tmp_path / ".final.partial", tmp_path / "final")
    assert os.listdir(tmp_path) == ["final"]
    assert os.listdir(tmp_path / "final") == [".final.partial"]


# Attempts that start again --------------------------------------------------------------------------------------------


def test_earlier_attempts_keep_their_checkpoints(run: Path, tiny: dict[str, Any], tmp_path: Path) -> None:
    values = {"checkpoint__keep_last": 1, "checkpoint__keep_best": 0}
    restarted = start(tiny, tmp_path, "--resume", "never", **values)
    assert restarted.status == 0, restarted.err
    folder = run / "checkpoints"
    assert f"in {folder}/attempt-1" in restarted.out
    for step in (2, 4):
        verify_files(aside := folder / "attempt-1" / f"step-{step:08}", read_manifest(aside))
    assert [path.name for path in folder.glob("step-*")] == ["step-00000004"], "retention applies to the new attempt"
    assert read_manifest(folder / "step-00000004").attempt == 2
    assert (folder / "latest").read_text() == (folder / "attempt-1" / "latest").read_text() == "step-00000004\n"

    back = start(tiny, tmp_path, "--resume", str(folder / "attempt-1"), training__max_steps=6, **values)
    assert back.status == 0, back.err
    assert f"({folder}/attempt-1/step-00000004, " in back.out
    assert read_manifest(folder / "attempt-2" / "step-00000004").attempt == 2
    assert [row["step"] for row in read_rows(run) if row["attempt"] == 3 and row["split"] == "train"] == [6]


def test_rollback_archives_newer_checkpoints(run: Path, tiny: dict[str, Any], tmp_path: Path) -> None:
    second = run / "checkpoints" / "step-00000002"
    ended = start(tiny, tmp_path, "--resume", str(second), training__max_steps=3, checkpoint__keep_last=1)
    assert ended.status == 0, ended.err
    verify_files(aside := run / "checkpoints" / "attempt-1" / "step-00000004", read_manifest(aside))
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == ["step-00000003"]


def test_archived_attempt_is_named_when_checkpoints_are_lost(run: Path, tiny: dict[str, Any], tmp_path: Path) -> None:
    """An attempt that starts again and is killed before its first save is followed by one that starts again."""
    config = with_values(tiny, checkpoint__every_steps=2, checkpoint__resume="never")
    with pytest.raises(AssertionError, match="exited without a result"):
        run_ranks(train_until_killed_at_first_save, 1, config)
    ended = start(tiny, tmp_path)
    assert ended.status == 0, ended.err
    assert "starting again at step 1" in ended.out
    (run / EVENTS).write_text((run / EVENTS).read_text().replace('"start"', '"finish"'))
    mark_interrupted(run)
    for path in (run / "checkpoints").glob("step-*"):
        shutil.rmtree(path)
    (run / "checkpoints" / "latest").unlink()
    (run / "checkpoints" / "best").unlink(missing_ok=True)
    lost = start(tiny, tmp_path)
    assert lost.status == 4
    assert f"resume from {run}/checkpoints/attempt-1 with --resume" in lost.err


# Full disks -----------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_jsonl_rows_are_retried_after_full_disk(tmp_path: Path) -> None:
    lines = JsonLines(path := tmp_path / "metrics.jsonl")
    lines.log({"step": 1})
    disk = lines._file

    class Full:
        """Accepts five bytes of a line, and then nothing."""

        capacity = 5

        def write(self, data: bytes) -> int:
            if self.capacity == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            written, self.capacity = disk.write(data[: self.capacity]), 0
            return written

    lines._file = Full()  # type: ignore[assignment]
    with captured_messages("trainer.tracking.jsonl") as messages:
        for step in (2, 3):
            lines.log({"step": step})
        assert len(messages) == 1, "once"
        assert path.read_text().splitlines()[1:] == ['{"ste']
        lines._file = disk
        lines.log({"step": 4})
        lines.close(0)
        assert path.read_text() == "".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4))
        with open("/dev/full", "wb", buffering=0) as full:
            (lines := JsonLines(path))._file = full
            lines.log({"step": 5})
            lines.close(0)
    assert messages[-1].endswith("lost the last 1 rows")


@pytest.mark.fast
def test_event_on_full_disk_leaves_no_partial_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append_event(tmp_path, "start", attempt=1, step=0)
    before = (tmp_path / EVENTS).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    append_event(tmp_path, "save", attempt=1, step=4)
    monkeypatch.undo()
    assert (tmp_path / EVENTS).read_bytes() == before
    append_event(tmp_path, "save", attempt=1, step=6)
    assert [event["step"] for event in read_events(tmp_path)] == [0, 6]


@pytest.mark.fast
def test_log_on_full_disk_warns_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = _RankFileHandler(tmp_path / "rank-0.log")
    assert file.stream is not None
    with open("/dev/full", "w") as file.stream:
        for text in ("one", "two"):
            file.emit(logging.LogRecord("x", logging.INFO, "", 0, text, (), None))
        with contextlib.suppress(OSError):
            file.stream.close()
    assert capsys.readouterr().err.count("lines are lost: No space left on device") == 1
    (tmp_path / "rank-1.log").symlink_to(tmp_path / "rank-0.log")
    with pytest.raises(ConfigError, match=r"rank-1\.log cannot be written"):
        configure_logging(1, tmp_path)
    configure_logging(0)


def full_at(config: dict[str, Any], name: str) -> tuple[int, str]:
    """Train while the disk is full for one file or folder; return the exit status and message."""
    full = OSError(errno.ENOSPC, "No space left on device")
    if name == "final":
        write = checkpoint_format.files._write

        def refuse(file: Any, data: Any, hashed: Any) -> None:
            if ".final.partial" in str(file.name):
                raise full
            write(file, data, hashed)

        checkpoint_format.files._write = refuse  # type: ignore[assignment]
    else:
        replace = os.replace

        def replaced(source: Any, target: Any) -> None:
            if Path(target).name == name:
                raise full
            replace(source, target)

        os.replace = replaced  # type: ignore[assignment]
    launch = Launch.from_environment()
    try:
        train(check_config(config, world_size=launch.world_size, device="cpu"), launch, StopRequests(launch.rank))
    except ConfigError as error:
        return error.exit_status, str(error)
    return 0, ""


@pytest.mark.parametrize("name", ["final", "config.json"])
def test_full_disk_exits_2(name: str, tiny: dict[str, Any], tmp_path: Path) -> None:
    status, message = run_ranks(full_at, 1, with_values(tiny, checkpoint__every_steps=2), name)[0]
    assert status == 2
    assert "No space left on device" in message
    assert not list((tmp_path / "run").glob(".*partial"))
    assert not (tmp_path / "run" / name).exists()
    ended = start(tiny, tmp_path)
    assert ended.status == 0, ended.err
    assert (tmp_path / "run" / "final" / "config.json").exists()
    assert ("resuming from step 4" in ended.out) == (name == "final")


def test_full_disk_at_end_of_run_exits_2_and_resumes(tiny: dict[str, Any], tmp_path: Path) -> None:
    """A checkpoint fits and the final model does not; with more space the same command finishes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=650k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        values = {"run__output_dir": str(disk / "run"), "checkpoint__every_steps": 4}
        ended = start(tiny, tmp_path, **values)
        assert ended.status == 2, ended.out
        assert "Traceback" not in ended.err
        assert "the model cannot be written: No space left on device" in ended.err
        assert not (disk / "run" / "final").exists()
        assert not list((disk / "run").glob(".*partial"))
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        ended = start(tiny, tmp_path, **values)
        assert ended.status == 0, ended.err
        assert "resuming from step 4" in ended.out
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Misplaced paths ------------------------------------------------------------------------------------------------------


def test_all_misplaced_paths_are_reported_at_once(tiny: dict[str, Any], tmp_path: Path) -> None:
    run, victim = tmp_path / "run", tmp_path / "victim"
    run.mkdir()
    victim.mkdir()
    (victim / "rows").write_text("{}\nunfinished")
    for name in ("final", "logs", "wandb"):
        (run / name).touch()
    (run / EVENTS).mkdir()
    (run / "metrics.jsonl").symlink_to(victim / "rows")
    (run / "checkpoints").symlink_to(victim)
    os.mkfifo(run / "config.json")
    ended = start(tiny, tmp_path)
    assert ended.status == 2, ended.err
    assert "error: 7 mistakes" in ended.err
    assert "Traceback" not in ended.err
    folders = [f"{name} is a file" for name in ("final", "logs", "wandb")]
    links = [f"{name} is a symbolic link" for name in ("metrics.jsonl", "checkpoints")]
    for message in (*folders, *links, f"{EVENTS} is a folder", "config.json is a special file"):
        assert message in ended.err
    assert (victim / "rows").read_text() == "{}\nunfinished"
    assert os.listdir(victim) == ["rows"]


def test_run_directory_may_be_symbolic_link(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    assert start(tiny, tmp_path).status == 0
    assert (tmp_path / "elsewhere" / "final").is_dir()


@pytest.mark.fast
def test_symbolic_links_inside_folders_are_reported(tmp_path: Path) -> None:
    for folder, name in (("checkpoints", "latest"), ("logs", "rank-3.log"), ("wandb", "run-id")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).symlink_to("/etc/hostname")
    assert len(list(layout_problems(tmp_path))) == 3
    assert not list(layout_problems(tmp_path / "absent"))


@pytest.mark.fast
def test_nothing_is_written_through_symbolic_link(tmp_path: Path) -> None:
    """Also if the link appears after the check at the start."""
    victim = tmp_path / "victim"
    victim.write_text("a\nb")
    for name in (".config.json.partial", EVENTS, "metrics.jsonl"):
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(OSError, match="symbolic"):
        replace_text(tmp_path / "config.json", "x")
    append_event(tmp_path, "save", attempt=1, step=1)
    with pytest.raises(ConfigError, match="cannot be opened"):
        JsonLines(tmp_path / "metrics.jsonl")
    assert victim.read_text() == "a\nb"


@pytest.mark.parametrize("content", [DEEP, "[1]", "7", '{"run": ', '{"tessera": 3, "run": []}'])
def test_damaged_config_json_does_not_hide_checkpoints(
    content: str, run: Path, tiny: dict[str, Any], tmp_path: Path
) -> None:
    (run / "config.json").write_text(content)
    ended = start(tiny, tmp_path, training__max_steps=6)
    assert "Traceback" not in ended.err
    assert ended.status == 0, ended.err
    assert "resuming from step 4" in ended.out
    assert json.loads((run / "config.json").read_text())["tessera"]["attempt"] == 2


@pytest.mark.parametrize("field", ["attempt", "finished_step", "final", None])
def test_metadata_of_wrong_type_is_ignored(field: str | None, run: Path, tiny: dict[str, Any], tmp_path: Path) -> None:
    stored = json.loads((run / "config.json").read_text())
    stored["tessera"] = ["x"] if field is None else {**stored["tessera"], field: {"x": [True]}}
    (run / "config.json").write_text(json.dumps(stored))
    ended = start(tiny, tmp_path)
    assert ended.status == 0, ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("content", [DEEP, "[]", '{"checksum": [], "format": {}}', '"manifest"'])
def test_damaged_manifest_does_not_hide_older_checkpoints(
    content: str, run: Path, tiny: dict[str, Any], tmp_path: Path
) -> None:
    mark_interrupted(run)
    (run / "checkpoints" / "step-00000004" / "manifest.json").write_text(content)
    (run / "config.json").write_text(content)
    assert (found := stored_run(run)) is not None
    assert found.about["world"]["processes"] == 1
    ended = start(tiny, tmp_path)
    assert ended.status == 0, ended.err
    assert "resuming from step 2" in ended.out
    assert "Traceback" not in ended.err


def test_unreachable_upload_is_refused_at_start(tiny: dict[str, Any], tmp_path: Path) -> None:
    address = f"ftp://127.0.0.1:{get_free_port()}/run"
    ended = start(tiny, tmp_path, checkpoint__upload=address)
    assert ended.status == 2, ended.out
    assert "checkpoint.upload: " in ended.err
    assert "cannot be reached" in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "run" / "final").exists()


def test_unresponsive_upload_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that accepts connections and never responds."""
    from trainer.checkpoint import object_store

    monkeypatch.setattr(object_store, "_TIMEOUT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"ftp://127.0.0.1:{server.getsockname()[1]}/run"
        with pytest.raises(ConfigError, match="no response within"):
            object_store.ObjectStore.connect(address)


@pytest.mark.fast
def test_model_that_reads_back_differently_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from trainer.model import export, write_model

    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = LlamaConfig(**sizes)
    model: nn.Module = LlamaForCausalLM(config)
    files = write_model(model, model.named_parameters(), tmp_path / "final", None)  # type: ignore[arg-type]
    before = {path.name for path in (tmp_path / "final").iterdir()}
    assert {file.name for file in files} == before
    write = checkpoint_format.files._write

    def flips(file: Any, data: Any, hashed: Any) -> None:
        hashed.update(data)
        write(file, bytes(len(data)), hashed.copy())

    monkeypatch.setattr(checkpoint_format.files, "_write", flips)
    with pytest.raises(ConfigError, match=r"model.safetensors differs from what was written when read back"):
        write_model(model, model.named_parameters(), tmp_path / "final", None)  # type: ignore[arg-type]
    assert find_damage(tmp_path / "final", [vars(file) for file in files]) == ""
    assert os.listdir(tmp_path) == ["final"]
    assert export.SHARD_BYTES
