"""Reading configuration files: `extends`, DeepSpeed files, and overrides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.config.load import check_config, load_config
from trainer.config.read import apply_override, merge, read_config_file
from trainer.errors import ConfigError

pytestmark = pytest.mark.fast


def test_extends_merges_objects_and_replaces_lists(tmp_path: Path) -> None:
    (tmp_path / "base.json").write_text('{"a": {"x": 1, "y": 2}, "b": [1, 2], "$schema": "s"}')
    (tmp_path / "middle.json").write_text('{"extends": "base.json", "a": {"y": 3}}')
    (tmp_path / "top.json").write_text('{"extends": "middle.json", "b": [9]}')
    assert read_config_file(tmp_path / "top.json") == {"a": {"x": 1, "y": 3}, "b": [9]}


def test_deepspeed_file_is_merged_into_section(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(tiny["deepspeed"]))
    (tmp_path / "config.json").write_text(json.dumps({**tiny, "deepspeed": "ds.json"}))
    inline = check_config(tiny, world_size=1, device="cpu")
    assert load_config(tmp_path / "config.json", world_size=1, device="cpu").resolved() == inline.resolved()


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("a.b=1", {"a": {"b": 1}}),
        ("a.b=text", {"a": {"b": "text"}}),
        ('a.b="1"', {"a": {"b": "1"}}),
        ("a.b=[1,2]", {"a": {"b": [1, 2]}}),
        ("a.b=x=y", {"a": {"b": "x=y"}}),
        ("list.0.path=z", {"list": [{"path": "z"}]}),
    ],
)
def test_override_sets_value(assignment: str, expected: dict[str, Any]) -> None:
    raw: dict[str, Any] = {"list": [{"path": "a"}]} if "list" in expected else {}
    apply_override(raw, assignment)
    assert raw == expected


@pytest.mark.parametrize("assignment", ["nothing", "=1", "list.5=1", "number.x=1", "extends=x.json"])
def test_malformed_override_is_refused(assignment: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        apply_override({"list": [1], "number": 3}, assignment)


@pytest.mark.parametrize(
    ("assignment", "key", "written"),
    [
        ("deepspeed.optimizer.params.lr=1e999", "deepspeed.optimizer.params.lr", "1e999"),
        ("evaluation.x=-Infinity", "evaluation.x", "-Infinity"),
        ("training.z_loss=NaN", "training.z_loss", "NaN"),
        ("run.seed=1" + "0" * 5000, "run.seed", "10000"),
        ('model.config={"sizes": [1, {"rope_theta": 1e400}]}', "model.config.sizes.1.rope_theta", "1e400"),
    ],
)
def test_non_finite_override_is_refused(assignment: str, key: str, written: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--set {key}: must be a finite number \(got {written}"):
        apply_override({}, assignment)


@pytest.mark.parametrize("text", ["1e308", "123456789012345678901234567890", "-0.0", '"NaN"', "nan"])
def test_override_with_infinite_looking_text_is_string(text: str) -> None:
    raw: dict[str, Any] = {}
    apply_override(raw, f"a={text}")
    assert json.dumps(raw["a"]) in (text.replace("1e308", "1e+308"), '"nan"')


def test_every_malformed_override_is_reported(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "config.json", ["nothing", "=1", "run.seed=3"])
    assert len(caught.value.problems) == 2


def test_override_reads_deepspeed_file(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({**tiny["deepspeed"], "gradient_clipping": 0.125}))
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    loaded = load_config(tmp_path / "config.json", [f"deepspeed={tmp_path / 'ds.json'}"], world_size=1)
    assert loaded.config.deepspeed.clipping == 0.125


def test_merge_does_not_change_arguments() -> None:
    base = {"a": {"x": 1}}
    assert merge(base, {"a": {"y": 2}}) == {"a": {"x": 1, "y": 2}}
    assert base == {"a": {"x": 1}}
