"""`run.plugins`: model classes of a user's package in every layout, and refusal of code that the user did not name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands import read_rows
from tests.configs import tiny_config, with_values
from tests.harness import CommandResult, run_command
from trainer.config.load import check_config
from trainer.config.plugins import import_plugins
from trainer.errors import ConfigError

ROOT = Path(__file__).parent.parent
PLUGIN = {"PYTHONPATH": str(ROOT / "tests" / "plugin")}
PLAN = {"layers.*.mlp.raise_it": "colwise", "layers.*.mlp.lower_it": "rowwise"}
"""Styles of the weights that the plan of the configuration class lacks."""


def wizard(corpus: Path, cache: Path, run: Path, **values: object) -> dict[str, Any]:
    config = tiny_config(corpus, cache, run)
    chosen = {"run__plugins": ["wizard"], "model__config__model_type": "wizard", "parallel__tensor_plan": PLAN}
    return with_values(config, **chosen, checkpoint__every_steps=1, **values)


def train(config: dict[str, Any], folder: Path, *arguments: str, world: int = 1) -> CommandResult:
    (folder / "X.json").write_text(json.dumps(config))
    script = str(ROOT / "launch" / "train.py")
    return run_command(script, "--config", str(folder / "X.json"), *arguments, world=world, environment=PLUGIN)


@pytest.fixture(scope="module")
def resumed(corpus: Path, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two steps on two tensor ranks, then resume for two steps on one process."""
    folder = tmp_path_factory.mktemp("plugin")
    config = wizard(corpus, shared_cache, folder / "run", parallel__tensor=2, training__max_steps=2)
    begun = train(config, folder, world=2)
    assert begun.status == 0, begun.err
    on_one = train(config, folder, "--set", "parallel.tensor=1", "--set", "training.max_steps=4")
    assert on_one.status == 0, on_one.err
    return folder / "run"


def test_plugin_model_matches_single_process_in_every_layout(
    resumed: Path, corpus: Path, shared_cache: Path, tmp_path: Path
) -> None:
    alone = train(wizard(corpus, shared_cache, tmp_path / "run"), tmp_path)
    assert alone.status == 0, alone.err
    expected, found = (
        {(row["split"], row["step"]): row["loss"] for row in read_rows(run)} for run in (tmp_path / "run", resumed)
    )
    assert found.keys() >= expected.keys() >= {("train", 4), ("validation", 4)}
    assert [found[key] for key in expected] == pytest.approx(list(expected.values()), rel=1e-5)
    stored = json.loads((resumed / "config.json").read_text())
    assert stored["run"]["plugins"] == ["wizard"]
    assert json.loads((resumed / "final" / "config.json").read_text())["architectures"] == ["WizardForCausalLM"]


@pytest.mark.parametrize("script", ["launch/generate.py", "tools/checkpoint.py"])
def test_recorded_plugin_runs_only_when_named(script: str, resumed: Path, tmp_path: Path) -> None:
    """Import nothing because of the content of a run directory, which may come from somebody else."""
    arguments = ["--run", str(resumed), "--prompt", "the quick", "--tokens", "3"]
    if script == "tools/checkpoint.py":
        arguments = ["export", str(resumed), str(tmp_path / "out"), "--check"]
    unnamed = run_command(str(ROOT / script), *arguments, environment=PLUGIN)
    assert unnamed.status == 2
    assert "trained with the code of wizard, which runs only if you name it. Add --plugin wizard" in unnamed.err
    named = run_command(str(ROOT / script), *arguments, "--plugin", "wizard", environment=PLUGIN)
    assert named.status == 0, named.err
    assert ("the quick" if script == "launch/generate.py" else "check passed") in named.out


def test_incomplete_tensor_plan_names_weight(corpus: Path, shared_cache: Path, tmp_path: Path) -> None:
    config = wizard(corpus, shared_cache, tmp_path / "run", parallel__tensor=2)
    ended = train(with_values(config, parallel__tensor_plan={}), tmp_path, "--dry_run")
    assert ended.status == 2
    assert "mlp.raise_it" in ended.err


def test_changed_plugin_is_refused_on_resume(resumed: Path, corpus: Path, shared_cache: Path, tmp_path: Path) -> None:
    config = wizard(corpus, shared_cache, resumed, training__max_steps=5)
    ended = train(with_values(config, run__plugins=["wizard", "json"]), tmp_path)
    assert ended.status == 2
    assert 'run.plugins: ["wizard", "json"] here, ["wizard"] in the run directory' in ended.err


@pytest.mark.fast
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import no_such_thing", "'bad' cannot be imported: ModuleNotFoundError: No module named 'no_such_thing'"),
        ("\nraise SystemExit(0)", "'bad' cannot be imported: SystemExit: 0 ({folder}/bad.py, line 2)"),
        ("x = (", "'bad' cannot be imported: SyntaxError"),
        (
            "raise RuntimeError('first\\nsecond')",
            "'bad' cannot be imported: RuntimeError: first ({folder}/bad.py, line 1)",
        ),
    ],
)
def test_failing_plugin_is_named(text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    (problem,) = import_plugins(["json", "bad"])
    assert words.format(folder=tmp_path) in str(problem)
    (missing,) = import_plugins(["json.nothing"])
    assert str(missing).startswith("run.plugins: there is no module 'json.nothing'")
    (missing,) = import_plugins(["no_package.inside"])
    assert "there is no module 'no_package.inside' (no module 'no_package')" in str(missing)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["", "a b", "a-b", "a..b", ".a", "a.", "1a", "a/b", "a:b", "a;b", "ä", "a.b\n"])
def test_plugin_name_must_be_module_name(name: str, tiny: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"run\.plugins\.0: expected"):
        check_config(with_values(tiny, run__plugins=[name]), world_size=1, device="cpu")
