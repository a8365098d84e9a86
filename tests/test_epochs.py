"""`training.epochs`: the number of steps is exact, and schedules and checkpoints follow it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.configs import with_values
from tests.harness import CommandResult, run_command
from trainer.config.load import LoadedConfig, check_config, with_steps
from trainer.config.schema import CheckpointSection
from trainer.data import open_batches, prepare_data, resolve_steps
from trainer.data.epochs import steps_for_epochs
from trainer.errors import ConfigError
from trainer.topology import Topology

TRAIN = str(Path(__file__).parent.parent / "launch" / "train.py")


@pytest.fixture
def epochs(tiny: dict[str, Any]) -> dict[str, Any]:
    """Configure a run of 1.5 epochs."""
    auto = {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_num_steps": 2}}
    training = {"epochs": 1.5, "log_every_steps": 5}
    return with_values(tiny, training=training, deepspeed__scheduler=auto, data__validation=[], checkpoint=None)


def loaded_from(config: dict[str, Any], world: int = 1) -> LoadedConfig:
    return check_config(config, world_size=world, device="cpu")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("epochs", "samples", "batch", "steps"),
    [
        (1.0, 800, 8, 100),
        (1.0, 801, 8, 101),
        (0.07, 100, 1, 7),
        (0.7, 10, 7, 1),
        (3.0, 7, 8, 3),
        (1e-6, 10, 8, 1),
        (0.3, 10**15, 1, 3 * 10**14),
    ],
)
def test_steps_for_epochs_are_exact(epochs: float, samples: int, batch: int, steps: int) -> None:
    """0.07 * 100 is 7, not 7.000000000000001, which would be rounded up to 8 steps."""
    assert steps_for_epochs(epochs, samples, batch) == steps


@pytest.mark.fast
def test_epochs_read_every_sample(epochs: dict[str, Any]) -> None:
    """Every number of ranks gives the same number of steps, and one step fewer would not read all samples."""
    config = with_values(epochs, training__epochs=2, data__packing="none")
    steps_of_worlds = set()
    for world in (1, 2, 4):
        loaded = loaded_from(config, world)
        prepared = prepare_data(loaded)
        loaded = resolve_steps(loaded, prepared)
        train = open_batches(loaded, prepared, Topology.of(world, 0)).train
        steps_of_worlds.add(loaded.steps)
        assert train.epochs_after(loaded.steps) >= 2 > train.epochs_after(loaded.steps - 1)
    assert len(steps_of_worlds) == 1


@pytest.mark.fast
def test_schedule_follows_resolved_steps(epochs: dict[str, Any]) -> None:
    loaded = loaded_from(epochs)
    assert loaded.known_steps is None
    with pytest.raises(RuntimeError):
        loaded.steps  # noqa: B018
    assert loaded.deepspeed_json["scheduler"]["params"]["total_num_steps"] == "auto"
    resolved = with_steps(loaded, 37)
    assert resolved.steps == 37
    assert resolved.deepspeed_json["scheduler"]["params"]["total_num_steps"] == 37
    explicit = with_values(epochs, deepspeed__scheduler__params__total_num_steps=36)
    resolved = with_steps(loaded_from(explicit), 37)
    assert "36 is less than the 37 steps of training.epochs (1.5)" in str(resolved.warnings[0])
    assert not with_steps(loaded_from(explicit), 36).warnings


@pytest.mark.fast
@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ({"type": "OneCycleLR", "params": {"max_lr": 0.1, "total_steps": 30}}, "must be at least the 37 steps"),
        ({"type": "WSD", "params": {"total_num_steps": "auto", "decay_num_steps": 40}}, "warmup_num_steps = 37"),
    ],
)
def test_schedule_longer_than_resolved_steps_is_reported(
    scheduler: dict[str, Any], words: str, epochs: dict[str, Any]
) -> None:
    loaded = loaded_from(with_values(epochs, deepspeed__scheduler=scheduler))
    with pytest.raises(ConfigError) as refused:
        with_steps(loaded, 37)
    assert words in str(refused.value)
    with_steps(loaded, 40 if scheduler["type"] == "WSD" else 30)


@pytest.mark.fast
def test_default_interval_writes_ten_checkpoints() -> None:
    default = CheckpointSection()
    assert default.keep_last == 2
    for steps in (1, 7, 10, 25, 200, 1001):
        interval = default.interval(steps)
        assert interval is not None
        assert steps // interval <= 10
        assert interval == 1 or steps / interval > 5
    assert default.interval(200) == 20
    assert CheckpointSection(every_steps=None).interval(200) is None
    assert CheckpointSection(every_steps=7).interval(200) == 7


def start(config: dict[str, Any], folder: Path, *arguments: str, world: int = 1) -> CommandResult:
    (folder / "config.json").write_text(json.dumps(config))
    return run_command(TRAIN, "--config", str(folder / "config.json"), *arguments, world=world)


def outcome(run: Path) -> tuple[list[Any], dict[str, torch.Tensor]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = [(row["step"], row["loss"], row["learning_rate"], row["epoch"]) for row in rows]
    return curve, load_file(run / "final" / "model.safetensors")


def test_run_stops_after_epochs(epochs: dict[str, Any], tmp_path: Path) -> None:
    """It equals the run of the derived number of steps; more epochs resume it, fewer are refused.

    Checkpoints are written at the default interval.
    """
    run = tmp_path / "run"
    epochs = with_values(epochs, training__epochs=0.25)
    ended = start(epochs, tmp_path, world=2)
    assert ended.status == 0, ended.err
    stored = json.loads((run / "config.json").read_text())
    steps = stored["tessera"]["steps"]
    assert f"training.epochs 0.25: {steps} steps of 8 samples" in ended.out
    assert stored["deepspeed"]["scheduler"]["params"]["total_num_steps"] == steps
    assert stored["training"]["max_steps"] is None, "so that the file can be given again"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [(e["event"], e["step"], e.get("reason")) for e in events[-1:]] == [("finish", steps, "epochs")]
    interval = -(-steps // 10)
    saved = [event["step"] for event in events if event["event"] == "save"]
    assert saved == sorted({*range(interval, steps + 1, interval), steps})
    left = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert left == [f"step-{step:08}" for step in saved[-2:]]

    same = with_values(epochs, training={"max_steps": steps, "log_every_steps": 5}, run__output_dir=str(tmp_path / "s"))
    assert start(same, tmp_path, world=2).status == 0
    curve, weights = outcome(run)
    expected, expected_weights = outcome(tmp_path / "s")
    assert curve == expected
    assert all(torch.equal(weight, expected_weights[name]) for name, weight in weights.items())

    again = start(epochs, tmp_path)
    assert again.status == 0
    assert f"finished at step {steps}" in again.out
    fewer = start(with_values(epochs, training__epochs=0.2), tmp_path)
    assert fewer.status == 2
    assert "training.epochs: 0.2, but the run in" in fewer.err
    other = with_values(epochs, training__epochs=0.5, deepspeed__train_batch_size=4)
    refused = start(other, tmp_path, "--allow_change", "deepspeed.train_batch_size")
    assert refused.status == 2
    assert "Set training.max_steps instead" in refused.err
    more = start(with_values(epochs, training__epochs=0.5), tmp_path)
    assert more.status == 0, more.err
    assert f"resuming from step {steps}" in more.out
    stored = json.loads((run / "config.json").read_text())
    assert outcome(run)[0][-1][0] == stored["tessera"]["steps"] == stored["tessera"]["finished_step"] > steps
