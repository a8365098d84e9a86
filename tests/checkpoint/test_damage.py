"""Damaged checkpoints fall back to the previous one; resumes that would train something else are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.cases import flip_bit, run_in_one_world
from tests.configs import with_values
from trainer.checkpoint_format import MANIFEST

TENSORS = "rank-00000.safetensors"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def point_outside(path: Path) -> None:
    path.write_text("../../elsewhere\n")


def point_nowhere(path: Path) -> None:
    path.write_text("step-00000099\n")


FILE_DAMAGES = [(damage, file) for damage in (flip_bit, truncate, empty, remove) for file in (TENSORS, MANIFEST)]
POINTER_DAMAGES = [(damage, "latest") for damage in (empty, remove, point_outside, point_nowhere)]

Outcome = Any
"""The losses by step, or the exit status and message of the error."""


@pytest.fixture(scope="module")
def saved_run(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a run directory with checkpoints of steps 1 and 2."""
    run = tmp_path_factory.mktemp("saved") / "run"
    run_in_one_world([(with_values(base, run__output_dir=str(run)), 2, (1, 2))])
    return run


@pytest.fixture(scope="module")
def damage_outcomes(
    base: dict[str, Any], saved_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str, str], Outcome]:
    """Resume runs whose newest checkpoint is damaged, in one world; by damage, file, and `auto` or `named`."""
    folder, jobs = tmp_path_factory.mktemp("damaged"), {}
    for i, (damage, file) in enumerate([*FILE_DAMAGES, *POINTER_DAMAGES]):
        for resume in ("auto", "named"):
            run = folder / f"{i}-{resume}"
            newest = run / "checkpoints" / "step-00000002"
            shutil.copytree(saved_run / "checkpoints", run / "checkpoints")
            damage(run / "checkpoints" / file if file == "latest" else newest / file)
            config = with_values(base, run__output_dir=str(run))
            if resume == "named":
                config = with_values(base, run__output_dir=str(folder / f"{i}-other"), checkpoint__resume=str(newest))
            jobs[damage.__name__, file, resume] = (config, 3)
    return dict(zip(jobs, run_in_one_world(list(jobs.values())), strict=True))


@pytest.mark.parametrize(("damage", "file"), FILE_DAMAGES)
def test_damaged_checkpoint_falls_back_to_previous(
    damage: Callable[[Path], None], file: str, damage_outcomes: dict[tuple[str, str, str], Outcome]
) -> None:
    losses = damage_outcomes[damage.__name__, file, "auto"]
    assert list(losses) == [2, 3], losses


@pytest.mark.parametrize(("damage", "file"), FILE_DAMAGES)
def test_damaged_checkpoint_is_refused_if_named(
    damage: Callable[[Path], None], file: str, damage_outcomes: dict[tuple[str, str, str], Outcome]
) -> None:
    status, message = damage_outcomes[damage.__name__, file, "named"]
    assert status == 4
    assert file in message


@pytest.mark.parametrize("resume", ["auto", "named"])
@pytest.mark.parametrize("damage", [damage for damage, _ in POINTER_DAMAGES])
def test_damaged_pointer_is_ignored(
    damage: Callable[[Path], None], resume: str, damage_outcomes: dict[tuple[str, str, str], Outcome]
) -> None:
    assert list(damage_outcomes[damage.__name__, "latest", resume]) == [3]


REFUSALS: dict[str, tuple[dict[str, Any], int, str]] = {
    "all checkpoints are damaged": (
        {"run__output_dir": "DAMAGED", "checkpoint__resume": "auto"},
        4,
        "all of its 2 checkpoints are damaged",
    ),
    "not a checkpoint": ({"checkpoint__resume": "FOLDER"}, 4, "not a checkpoint: it has no manifest.json"),
    "absent path": ({"checkpoint__resume": "FOLDER/absent"}, 4, "does not exist"),
    "empty store": ({"checkpoint__resume": "memory://nowhere"}, 4, "no checkpoint found"),
    "unknown store": ({"checkpoint__resume": "s4://bucket/x"}, 2, "checkpoint.resume: 's4://bucket/x'"),
    "past the last step": ({"training__max_steps": 1}, 2, "training.max_steps: 1, and"),
    "seed": ({"run__seed": 5}, 2, "run.seed: 5 here, 11 in"),
    "model": ({"model__config__hidden_size": 64}, 2, "model.config.hidden_size: 64 here, 32 in"),
    "batch size": ({"deepspeed__train_batch_size": 6}, 2, "deepspeed.train_batch_size: 6 here, 12 in"),
    "optimizer": (
        {"deepspeed__optimizer__type": "SGD", "deepspeed__optimizer__params": {"lr": 0.1}},
        2,
        'deepspeed.optimizer.type: "SGD" here',
    ),
    "data": ({"data__train": [{"path": "OTHER_DATA"}]}, 2, "data.train: ["),
}
"""Changed values, exit status, message."""

ALLOWED: dict[str, dict[str, Any]] = {
    "data": {"data__train": [{"path": "OTHER_DATA"}], "checkpoint__allow_changed": ["data.train"]},
    "batch size": {
        "deepspeed__train_batch_size": 6,
        "checkpoint__allow_changed": ["deepspeed.train_batch_size"],
    },
}


@pytest.fixture(scope="module")
def resume_outcomes(
    base: dict[str, Any], saved_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, bool], Outcome]:
    """By name, and whether the change is allowed; all in one world."""
    folder = tmp_path_factory.mktemp("refused")
    damaged, other_data = folder / "damaged", folder / "other.jsonl"
    shutil.copytree(saved_run, damaged)
    for checkpoint in damaged.glob("checkpoints/step-*"):
        flip_bit(checkpoint / TENSORS)
    other_data.write_text("\n".join(json.dumps({"text": f"{n} wizards"}) for n in range(200)))
    named = with_values(base, run__output_dir=str(folder / "run"), checkpoint__resume=str(saved_run))
    paths = {"DAMAGED": str(damaged), "FOLDER": str(folder), "OTHER_DATA": str(other_data)}

    def substitute(value: Any) -> Any:
        text = json.dumps(value)
        for name, path in paths.items():
            text = text.replace(name, path)
        return json.loads(text)

    changes = {(name, False): values for name, (values, _, _) in REFUSALS.items()}
    changes |= {(name, True): values for name, values in ALLOWED.items()}
    configs = [with_values(named, **substitute(values)) for values in changes.values()]
    return dict(zip(changes, run_in_one_world([(config, 3) for config in configs]), strict=True))


@pytest.mark.parametrize("name", REFUSALS)
def test_invalid_resume_is_refused(name: str, resume_outcomes: dict[tuple[str, bool], Outcome]) -> None:
    """With an exit status and a reason; never by a silent start at step 1."""
    _, expected_status, expected_message = REFUSALS[name]
    status, message = resume_outcomes[name, False]
    assert status == expected_status
    assert expected_message in message


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed_change_resumes(name: str, resume_outcomes: dict[tuple[str, bool], Outcome]) -> None:
    assert list(resume_outcomes[name, True]) == [3]
