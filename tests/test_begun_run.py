"""A run started by an earlier version resumes with that version's defaults: tests/data/begun_run."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.configs import with_values
from tests.harness import CommandResult, run_command
from trainer.checkpoint_format import read_manifest
from trainer.config.earlier_versions import ABSENT, ADDED_KEYS, AddedKey, stored_run, upgrade_config, value_at
from trainer.config.load import LoadedConfig, load_config
from trainer.errors import ConfigError
from trainer.run_directory import RunDirectory
from trainer.run_identity import refuse_identity_change

ROOT = Path(__file__).parent.parent
BEGUN = ROOT / "tests" / "data" / "begun_run"
CONFIG = str(BEGUN / "config.json")
STEPS = 12
STORED_STEPS = 3

BEFORE = {
    row.key: row.legacy_value_in({}) for row in ADDED_KEYS if row.legacy_value_in({}) not in (ABSENT, row.new_default)
}
"""Defaults of that version, by added key, where new runs have others."""

Weights = dict[str, torch.Tensor]


def train(run: Path, *arguments: str, **values: object) -> CommandResult:
    """Run the training command, with the cache next to the run directory."""
    paths = {"run.output_dir": str(run), "data.cache_dir": str(run.parent / "cache"), "training.max_steps": STEPS}
    settings = [f"{key}={json.dumps(value)}" for key, value in {**paths, **values}.items()]
    return run_command(
        "launch/train.py", "--config", CONFIG, *(part for s in settings for part in ("--set", s)), *arguments
    )


def copy_begun_run(folder: Path) -> Path:
    """Copy the stored run directory."""
    shutil.copytree(BEGUN / "run", folder)
    return folder


def losses(metrics: Path) -> dict[tuple[str, int], float]:
    """Return losses by split and step; of repeated steps the last."""
    rows = map(json.loads, metrics.read_text().splitlines())
    return {(row["split"], row["step"]): row["loss"] for row in rows}


def read_outcome(run: Path) -> tuple[dict[tuple[str, int], float], Weights]:
    return losses(run / "metrics.jsonl"), load_file(run / "final" / "model.safetensors")


STORED = losses(BEGUN / "unbroken.jsonl"), load_file(BEGUN / "unbroken.safetensors")


def after_resuming(losses: dict[tuple[str, int], float]) -> dict[tuple[str, int], float]:
    return {(split, step): loss for (split, step), loss in losses.items() if step > STORED_STEPS}


def assert_equal(actual: tuple[Any, Weights], expected: tuple[Any, Weights], tolerance: float = 0.0) -> None:
    assert after_resuming(actual[0]) == pytest.approx(after_resuming(expected[0]), rel=tolerance, abs=0.0)
    assert actual[1].keys() == expected[1].keys()
    for name, weight in actual[1].items():
        torch.testing.assert_close(weight, expected[1][name], rtol=tolerance, atol=tolerance)


def test_begun_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Resume with the losses and weights of the stored unbroken run.

    Another type of CPU rounds sums differently; there the reference is a run with the old values set explicitly.
    """
    resumed = train(copy_begun_run(tmp_path / "run"))
    assert resumed.status == 0, resumed.err
    ended = train(tmp_path / "fresh", **BEFORE)
    assert ended.status == 0, ended.err
    fresh = read_outcome(tmp_path / "fresh")
    assert_equal(fresh, STORED, 1e-5)
    if fresh[0] == STORED[0]:
        assert_equal(read_outcome(tmp_path / "run"), STORED)
    else:
        explicit = train(copy_begun_run(tmp_path / "explicit"), **BEFORE)
        assert explicit.status == 0, explicit.err
        assert_equal(read_outcome(tmp_path / "run"), read_outcome(tmp_path / "explicit"))
        assert_equal(read_outcome(tmp_path / "run"), STORED, 1e-5)
    kept = [line for line in resumed.out.splitlines() if "resuming with the values" in line]
    assert len(kept) == 1, resumed.out
    assert kept[0].removeprefix("[tessera] ") in (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    for key, value in BEFORE.items():
        assert f"{key} = {json.dumps(value)} (new runs: " in kept[0]
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert {key: value_at(stored, key) for key in BEFORE} == BEFORE, "the next attempt finds them written down"
    newest = tmp_path / "run" / "checkpoints" / f"step-{STEPS:08}"
    assert set(BEFORE) <= set(stored["tessera"]["kept_meanings"])
    assert set(BEFORE) <= set(read_manifest(newest).about["kept_meanings"])


@pytest.mark.parametrize("upload", [False, True])
def test_begun_run_resumes_twice(upload: bool, tmp_path: Path) -> None:
    """Also if only its copies at `checkpoint.upload` are left, with the arguments that the refusal names."""
    run, copies, settings = tmp_path / "run", tmp_path / "copies", ()
    if upload:
        copy_begun_run(tmp_path / "begun")
        shutil.copytree(tmp_path / "begun" / "checkpoints", copies)
        upload_key = {"checkpoint.upload": f"file://{copies}"}
        refused = train(run, **upload_key)
        assert refused.status == 2, refused.err
        settings = tuple(f"{key}={json.dumps(value)}" for key, value in BEFORE.items())
        assert all(f"(--set {shlex.quote(setting)})" in refused.err for setting in settings), refused.err
        arguments = [part for setting in settings for part in ("--set", setting)]
    else:
        upload_key, arguments = {}, []
        copy_begun_run(run)
    for steps in (STORED_STEPS + 1, STORED_STEPS + 2):
        resumed = train(run, *arguments, **upload_key, **{"training.max_steps": steps})
        assert resumed.status == 0, resumed.err
    assert f"resuming from step {STORED_STEPS + 1}" in resumed.out
    resumed_losses = losses(run / "metrics.jsonl")
    assert resumed_losses["train", steps] == pytest.approx(STORED[0]["train", steps], rel=1e-5)


def test_new_run_uses_new_defaults(tmp_path: Path) -> None:
    """The negative control: without the run directory the same command gives other losses."""
    ended = train(tmp_path / "run", **{"training.max_steps": STORED_STEPS})
    assert ended.status == 0, ended.err
    assert "resuming with the values" not in ended.out
    new = json.loads((tmp_path / "run" / "config.json").read_text())
    assert all(value_at(new, key) != before for key, before in BEFORE.items())
    new_losses = losses(tmp_path / "run" / "metrics.jsonl")
    assert all(abs(new_losses["train", step] - STORED[0]["train", step]) > 1e-4 for step in (2, 3)), new_losses


@pytest.mark.fast
def test_resumed_run_keeps_earlier_defaults(tmp_path: Path) -> None:
    """From the run directory, or from what checkpoint.resume names; not if a run starts again."""
    run, paths = copy_begun_run(tmp_path / "run"), [f"data.cache_dir={tmp_path}"]
    elsewhere = f"run.output_dir={tmp_path / 'other'}"
    resumes = [f"checkpoint.resume={run}", f"checkpoint.resume={run}/checkpoints/step-00000003"]
    for settings in ([f"run.output_dir={run}"], *([elsewhere, resume] for resume in resumes)):
        loaded = load_config(CONFIG, [*paths, *settings], world_size=1, device="cpu")
        assert {key: value_at(loaded.resolved(), key) for key in BEFORE} == BEFORE
        assert loaded.legacy_defaults.message.count(str(tmp_path)) == 1
    for settings in ([f"run.output_dir={run}", "checkpoint.resume=never"], [elsewhere]):
        loaded = load_config(CONFIG, [*paths, *settings], world_size=1, device="cpu")
        assert all(value_at(loaded.resolved(), key) != before for key, before in BEFORE.items())
        assert not loaded.legacy_defaults.message


@pytest.mark.fast
def test_dry_run_reports_kept_defaults(tmp_path: Path) -> None:
    run = copy_begun_run(tmp_path / "run")
    for option in ("--dry_run", "--print_config"):
        ended = train(run, option)
        assert ended.status == 0, ended.err
        assert sum("resuming with the values" in line for line in ended.err.splitlines()) == 1
    assert value_at(json.loads(ended.out), "data.special_tokens") == "end"


@pytest.mark.fast
def test_upgraded_configuration_has_every_added_key() -> None:
    old = json.loads((BEGUN / "run" / "config.json").read_text())
    new = upgrade_config(old)
    assert {key: value_at(new, key) for key in BEFORE} == BEFORE
    assert value_at(new, "data.append_end_of_text") is ABSENT
    assert value_at(old, "data.special_tokens") is ABSENT, "what is passed in stays as it is"
    assert upgrade_config(new) == new
    without = with_values(old, data__append_end_of_text=False)
    assert value_at(upgrade_config(without), "data.special_tokens") == "none"
    assert value_at(upgrade_config(with_values(old, data__packing="none")), "data.drop_last") is False, (
        "as it must be there"
    )
    explicit = with_values(old, data__special_tokens="none")
    assert value_at(upgrade_config(explicit), "data.special_tokens") == "none", "what is set stays"


@pytest.mark.fast
@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/step-00000003"])
def test_stored_run_is_read(place: str, tmp_path: Path) -> None:
    run = stored_run(BEGUN / "run" / place)
    assert run is not None
    assert value_at(run.config, "data.special_tokens") == "end"
    assert run.about["world"]["processes"] == 1
    assert stored_run(tmp_path) is None
    (tmp_path / "config.json").write_text("{")
    assert stored_run(tmp_path) is None


@pytest.mark.fast
def test_added_key_may_depend_on_model_family(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A key that the schema does not list, in the configurations that a function selects."""

    def is_decoder(stored: object) -> object:
        return False if value_at(stored, "model.config.model_type") == "llama" else ABSENT

    row = AddedKey("model.config.is_decoder", is_decoder, default=True)
    monkeypatch.setattr("trainer.config.earlier_versions.ADDED_KEYS", (row,))
    assert upgrade_config({"model": {"config": {"model_type": "llama"}}})["model"]["config"]["is_decoder"] is False
    assert "is_decoder" not in upgrade_config({"model": {"config": {"model_type": "gpt2"}}})["model"]["config"]
    assert upgrade_config({"model": {"path": "x", "config": None}}) == {"model": {"path": "x", "config": None}}


@pytest.mark.fast
def test_configuration_in_run_directory_is_valid_input() -> None:
    loaded = load_config(BEGUN / "run" / "config.json", world_size=1, device="cpu")
    assert loaded.config.data.special_tokens == "end"


def with_new_configuration(folder: Path, **values: object) -> tuple[Path, list[str]]:
    """Write a run directory with `values` of the user; return it and the arguments that resume it."""
    settings = [f"run.output_dir={folder}", f"data.cache_dir={folder}"]
    chosen = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    loaded = load_config(CONFIG, [*settings, *chosen], world_size=1, device="cpu")
    RunDirectory(folder, 1, None).write_config(loaded, frame=None)
    return folder, settings


@pytest.mark.fast
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.learning_rate_scales", {"model.norm.weight": 0.0}),
        ("training.weight_decay_exclude", []),
        ("data.special_tokens", "none"),
    ],
)
def test_explicit_values_are_not_kept(key: str, value: object, tmp_path: Path) -> None:
    """Removing the key is a change of value, as with every key that identifies a run."""
    run, settings = with_new_configuration(tmp_path / "run", **{key: value})
    loaded = load_config(CONFIG, settings, world_size=1, device="cpu")
    assert not loaded.legacy_defaults.message
    assert not loaded.legacy_defaults.keys
    old = json.loads((run / "config.json").read_text())
    with pytest.raises(ConfigError) as refused:
        refuse_identity_change(old, loaded, "the run directory")
    assert all(problem.path.startswith(key) for problem in refused.value.problems)
    assert f"--set {shlex.quote(f'{key}={json.dumps(value)}')}" in str(refused.value)


@pytest.mark.fast
def test_kept_defaults_survive_further_attempts(tmp_path: Path) -> None:
    """Through attempts that set the same values, but not for a value that an attempt has changed."""
    run = copy_begun_run(tmp_path / "run")
    settings = [f"run.output_dir={run}", f"data.cache_dir={tmp_path}"]

    def attempt(*arguments: str) -> LoadedConfig:
        loaded = load_config(CONFIG, [*settings, *arguments], world_size=1, device="cpu")
        RunDirectory(run, 2, None).write_config(loaded, frame=None)
        return loaded

    for arguments in ((), ("data.special_tokens=end",), ()):
        loaded = attempt(*arguments)
        assert loaded.config.data.special_tokens == "end"
        assert set(BEFORE) <= set(loaded.legacy_defaults.keys)
    changed = attempt("data.special_tokens=none", 'checkpoint.allow_changed=["data.special_tokens"]')
    assert "data.special_tokens" not in changed.legacy_defaults.keys
    assert attempt().config.data.special_tokens == "tokenizer", "and refused where it is compared"


@pytest.mark.fast
def test_kept_defaults_respect_changed_packing(tmp_path: Path) -> None:
    """`data.drop_last` has no meaning without concatenation: kept values do not make the change invalid."""
    allowed = 'checkpoint.allow_changed=["data.packing"]'
    settings = [
        f"run.output_dir={copy_begun_run(tmp_path / 'run')}",
        f"data.cache_dir={tmp_path}",
        "data.packing=none",
        allowed,
    ]
    loaded = load_config(CONFIG, settings, world_size=1, device="cpu")
    assert loaded.config.data.drop_last is False
    assert "data.drop_last" not in loaded.legacy_defaults.message
    assert "data.special_tokens" in loaded.legacy_defaults.message


@pytest.mark.fast
def test_conflicting_explicit_value_is_refused(tmp_path: Path) -> None:
    run = copy_begun_run(tmp_path / "run")
    settings = [f"run.output_dir={run}", f"data.cache_dir={tmp_path}", "data.special_tokens=none"]
    loaded = load_config(CONFIG, settings, world_size=1, device="cpu")
    old = json.loads((run / "config.json").read_text())
    with pytest.raises(ConfigError) as refused:
        refuse_identity_change(old, loaded, "the run directory")
    assert [problem.path for problem in refused.value.problems] == ["data.special_tokens"]
    allowed = [*settings, 'checkpoint.allow_changed=["data.special_tokens"]']
    refuse_identity_change(old, load_config(CONFIG, allowed, world_size=1, device="cpu"), "the run directory")


@pytest.mark.fast
def test_resumed_run_keeps_checkpoint_defaults(tmp_path: Path) -> None:
    """The new default of keep_last would delete what the earlier version kept. A key that is set wins."""
    run, keys = copy_begun_run(tmp_path / "run"), ("every_steps", "keep_last")
    stored = json.loads((run / "config.json").read_text())
    stored["checkpoint"].update(dict.fromkeys(keys))
    (run / "config.json").write_text(json.dumps(stored))
    paths = {"run__output_dir": str(run), "data__cache_dir": str(tmp_path)}
    config = with_values(json.loads(Path(CONFIG).read_text()), checkpoint={}, **paths)
    (tmp_path / "config.json").write_text(json.dumps(config))

    def attempt(*settings: str) -> LoadedConfig:
        loaded = load_config(tmp_path / "config.json", settings, world_size=1, device="cpu")
        RunDirectory(run, 2, None).write_config(loaded, frame=None)
        return loaded

    for _ in range(2):
        loaded = attempt()
        assert [getattr(loaded.config.checkpoint, key) for key in keys] == [None, None]
        assert (
            'checkpoint.every_steps = null (new runs: "auto"), checkpoint.keep_last = null'
            in loaded.legacy_defaults.message
        )
    loaded = attempt("checkpoint.keep_last=3")
    assert [getattr(loaded.config.checkpoint, key) for key in keys] == [None, 3]
    loaded = attempt()
    assert [getattr(loaded.config.checkpoint, key) for key in keys] == [None, 2], "this version stored the 3"
    for settings in (["checkpoint.resume=never"], [f"run.output_dir={tmp_path / 'new'}"]):
        fresh = load_config(tmp_path / "config.json", settings, world_size=1, device="cpu")
        assert [getattr(fresh.config.checkpoint, key) for key in keys] == ["auto", 2]
