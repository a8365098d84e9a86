"""The retention policy, and the best checkpoint."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.cases import make_manifest, run_cli, validation_sources
from tests.configs import with_values
from trainer.checkpoint.retention import best_checkpoints, expired
from trainer.checkpoint.saved import SavedCheckpoint, checkpoint_name
from trainer.checkpoint_format import read_manifest
from trainer.config.schema import CheckpointSection

LOSSES = {10: 3.0, 20: 1.0, 30: 2.0, 40: None, 50: math.nan, 60: 1.5}
"""Validation loss by step."""


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[SavedCheckpoint]:
    """Newest first."""
    return [
        SavedCheckpoint(tmp_path / checkpoint_name(step), make_manifest(step=step, losses={"validation": loss}))
        for step, loss in reversed(LOSSES.items())
    ]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("policy", "steps"),
    [
        ({"keep_last": None}, []),
        ({}, [40, 30, 10]),
        ({"keep_last": 1, "keep_best": 0}, [50, 40, 30, 20, 10]),
        ({"keep_last": 2}, [40, 30, 10]),
        ({"keep_last": 1, "keep_best": 2, "keep_every_steps": 30}, [50, 40, 10]),
    ],
)
def test_retention_policy_expires_checkpoints(
    policy: dict[str, Any], steps: list[int], checkpoints: list[SavedCheckpoint]
) -> None:
    assert [checkpoint.manifest.step for checkpoint in expired(checkpoints, CheckpointSection(**policy))] == steps


@pytest.mark.fast
def test_best_checkpoints_have_lowest_finite_loss(checkpoints: list[SavedCheckpoint]) -> None:
    assert [checkpoint.manifest.step for checkpoint in best_checkpoints(checkpoints, 2)] == [20, 60]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("sources", "limit", "earlier", "best"),
    [(2, 3, None, 20), (2, None, None, 10), (1, 3, None, 10), (2, 3, [8, 4], 10), (2, 3, [12, 0], 20)],
)
def test_best_checkpoint_compares_same_validation_samples(
    sources: int, limit: int | None, earlier: list[int] | None, best: int, tmp_path: Path
) -> None:
    """Checkpoints of an earlier version record no samples, and used others with several sources and a limit."""
    config = {"data": {"validation": [{}] * sources}, "evaluation": {"max_batches": limit}}
    checkpoints = []
    for step, loss, samples in ((30, 3.0, [8, 4]), (20, 2.0, [8, 4]), (10, 1.0, earlier)):
        about = {} if samples is None else {"evaluated_samples": samples}
        manifest = make_manifest(step=step, losses={"validation": loss}, config=config, about=about)
        checkpoints.append(SavedCheckpoint(tmp_path / checkpoint_name(step), manifest))
    assert best_checkpoints(checkpoints)[0].manifest.step == best
    assert best_checkpoints(checkpoints[2:]) == checkpoints[2:], "the newest itself is always compared"


def test_resume_warns_about_other_validation_samples(base: dict[str, Any], tmp_path: Path) -> None:
    """Once, when the samples change; `best` then ignores the earlier loss, however low it is."""
    config = with_values(
        base,
        run__output_dir=str(tmp_path / "run"),
        data__validation=validation_sources(base) * 2,
        training__max_steps=1,
        evaluation={"max_batches": 2, "every_steps": 1},
    )
    assert run_cli(config, tmp_path).status == 0
    folder = tmp_path / "run" / "checkpoints"
    first = read_manifest(folder / checkpoint_name(1))
    assert len(first.about["evaluated_samples"]) == 2
    about = {key: value for key, value in first.about.items() if key != "evaluated_samples"}
    earlier = replace(first, about=about, losses={"validation": 0.1})
    (folder / checkpoint_name(1) / "manifest.json").write_text(earlier.to_json())
    for steps, warnings in ((2, 1), (3, 0)):
        ended = run_cli(with_values(config, training__max_steps=steps), tmp_path)
        assert ended.status == 0, ended.err
        assert ended.out.count("validation losses are over other samples") == warnings
    assert (folder / "best").read_text().strip() != checkpoint_name(1)
