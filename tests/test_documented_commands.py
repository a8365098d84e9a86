"""Every documented command is executed, with the documented result."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.configs import with_values
from tests.documented_commands import (
    COMMANDS,
    QUICKSTART,
    ROOT,
    SHORT,
    TESTED_ELSEWHERE,
    Run,
    commands_of_page,
    documented_commands,
    make_targets,
)
from tests.harness import CommandResult, run_command


@pytest.fixture(scope="module")
def documented() -> set[str]:
    return documented_commands()


def run(command: str, row: Run, clone: Path) -> CommandResult:
    """Run `command` without its launcher, in forked processes."""
    words = shlex.split(command)
    script = next(word for word in words if word.startswith(("launch/", "tools.")))
    arguments = words[words.index(script) + 1 :]
    if script.startswith("tools."):
        path = ROOT / script.replace(".", "/")
        script = str(clone / (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).relative_to(ROOT))
    shortened = [row.shorter.get(word, word) for word in arguments]
    return run_command(script, *filter(None, shortened), *row.add, world=row.world, working_folder=clone)


@pytest.fixture(scope="module")
def clone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the project, and create the files that the pages name."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("launch", "tools", "ds_configs", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(corpus, folder / "corpus")
    values: dict[str, Any] = {"extends": "ds_configs/quickstart.json"}
    for assignment in SHORT[1::2]:
        key, _, value = assignment.partition("=")
        values = with_values(
            values, **{key.replace(".", "__"): json.loads(value) if value[0] in "[0123456789" else value}
        )
    (folder / "X.json").write_text(json.dumps(with_values(values, run__output_dir="runs/NAME")))
    mistakes = {
        "parallel": {"tensr": 1},
        "deepspeed": {"train_batch_size": 65, "train_micro_batch_size_per_gpu": 2},
        "data": {"train": [{"path": "elsewhere/*.jsonl"}]},
    }
    (folder / "mine.json").write_text(json.dumps({"extends": "X.json", **mistakes}))
    return folder


@pytest.fixture(scope="module")
def quickstart(clone: Path) -> CommandResult:
    ended = run(QUICKSTART, COMMANDS[QUICKSTART], clone)
    trained = clone / "runs" / "quickstart"
    if trained.is_dir():
        for name in ("NAME", "fine-tune"):
            shutil.copytree(trained, clone / "runs" / name)
        for name, target in (
            ("A", "checkpoints/step-00000001"),
            ("B", "checkpoints/step-00000002"),
            ("FOLDER", "final"),
        ):
            (clone / name).symlink_to(trained / target)
    return ended


@pytest.mark.fast
def test_every_documented_command_has_a_row(documented: set[str]) -> None:
    commands = documented - TESTED_ELSEWHERE.keys()
    run_here = {command for command in commands if not command.startswith("make ") and "-m pytest" not in command}
    assert run_here - COMMANDS.keys() == set(), "documented commands without a row in tests/documented_commands.py"
    assert COMMANDS.keys() - run_here == set(), "rows of commands that no page documents"


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=[pytest.mark.matrix] * row.matrix) for name, row in COMMANDS.items()]
)
def test_documented_command(command: str, clone: Path, quickstart: CommandResult) -> None:
    row = COMMANDS[command]
    ended = quickstart if command == QUICKSTART else run(command, row, clone)
    assert ended.status == row.status, ended.out + ended.err
    assert "Traceback" not in ended.err
    for words in row.says:
        assert words in ended.out + ended.err


def test_documented_error_example_is_current(clone: Path, quickstart: CommandResult) -> None:
    """The page shows what the command prints, word for word."""
    page = (ROOT / "docs" / "configuring.md").read_text(encoding="utf-8")
    block = page.partition("--config mine.json\n")[2].partition("\n\n")[0]
    shown = [
        line.strip().replace("corpus/", "elsewhere/").replace("/home/me", str(clone)) for line in block.splitlines()
    ]
    command = "deepspeed launch/train.py --config mine.json"
    ended = run(command, COMMANDS[command], clone)
    assert sorted(line.strip() for line in ended.err.splitlines()) == sorted(shown)


@pytest.mark.parametrize("name", ["ds_configs/schema.json", "docs/configuration.md"])
def test_generated_file_in_repository_is_current(name: str, clone: Path, quickstart: CommandResult) -> None:
    (clone / name).unlink()
    assert run("python -m tools.schema", Run(), clone).status == 0
    assert (clone / name).read_text() == (ROOT / name).read_text()


@pytest.mark.fast
def test_documented_targets_and_markers_exist(documented: set[str]) -> None:
    targets = {command.split()[1] for command in documented if command.startswith("make ")}
    assert targets >= {"quickstart", "test"}
    assert targets <= set(make_targets())
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    declared = {marker.partition(":")[0] for marker in settings["markers"]}
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for command in (command for command in documented if "-m pytest -m" in command):
        for name in set(re.findall(r"\w+", command.partition("-m pytest -m ")[2])) - {"not", "and"}:
            assert name in declared, command
            assert f"mark.{name}" in tests, f"{command} selects no test"


@pytest.mark.fast
def test_commands_are_found_in_every_page() -> None:
    page = """
Type `python -m tools.bench
traffic` or `make test`; the `deepspeed` section is no command, and deepspeed launch/x.py in a sentence is none.

    $ deepspeed launch/train.py --config a.json
    .venv/bin/python -m tools.schema          what it does
    make help   # a comment

```
torchrun launch/train.py --config b.json
```
"""
    assert set(commands_of_page(page)) == {
        "python -m tools.bench traffic",
        "make test",
        "deepspeed launch/train.py --config a.json",
        "python -m tools.schema",
        "make help",
        "torchrun launch/train.py --config b.json",
    }
