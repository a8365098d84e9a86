"""Invalid inputs end with their exit status and one readable message, without a traceback."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.bad_inputs import BAD_INPUTS, Bad
from tests.configs import VOCABULARY, with_values
from tests.harness import run_command
from trainer.config.load import load_config
from trainer.config.rules import RULES
from trainer.data.indexed import IndexedWriter
from trainer.data.tokenizer import train_tokenizer
from trainer.errors import ConfigError
from trainer.sanitize import sanitize_text

TRAIN = str(Path(__file__).parent.parent / "launch" / "train.py")


@pytest.fixture(scope="module")
def tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    text = (corpus / "train.jsonl").read_text().splitlines()
    train_tokenizer((json.loads(line)["text"] for line in text), VOCABULARY, folder)
    return folder


def write_files(bad: Bad, folder: Path) -> None:
    for name, content in bad.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content.startswith(b"{tokens to"):
            with IndexedWriter(path.with_suffix(""), np.uint16) as writer:
                writer.add(list(range(int(content[11:14]))))
        elif content.startswith(b"{index of 100 tokens}"):
            with IndexedWriter(folder / "whole", np.uint16) as writer:
                writer.add([1] * 100)
            path.write_bytes((folder / "whole.idx").read_bytes())
        elif not (content == b"" and path.exists()):
            path.write_bytes(content)


def fill_placeholders(value: object, **names: Path) -> object:
    text = json.dumps(value)
    for name, path in names.items():
        text = text.replace("{" + name + "}", str(path))
    return json.loads(text)


@pytest.mark.fast
def test_bad_inputs_table_is_complete() -> None:
    assert len(BAD_INPUTS) >= 40
    assert max(Counter(bad.name for bad in BAD_INPUTS).values()) == 1


@pytest.mark.fast
def test_every_rule_has_failing_example() -> None:
    assert {rule.name for rule in RULES} == {bad.rule for bad in BAD_INPUTS if bad.rule}


def write_config(bad: Bad, config: dict[str, Any], folder: Path, tokenizer: Path) -> Path:
    """Write the files of a row below a folder, and its configuration."""
    inputs = folder / "input"
    inputs.mkdir()
    write_files(bad, inputs)
    filled = fill_placeholders(with_values(config, **bad.values), tmp=inputs, tokenizer=tokenizer)
    path = folder / "config.json"
    path.write_text(json.dumps(filled) if bad.text is None else bad.text, encoding="utf-8")
    return path


@pytest.mark.fast
@pytest.mark.parametrize(
    "bad", [bad for bad in BAD_INPUTS if bad.status == 2 and not bad.needs_data], ids=lambda bad: bad.name
)
def test_bad_configuration_is_refused_on_loading(bad: Bad, tiny: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(write_config(bad, tiny, tmp_path, tmp_path), world_size=1, device="cpu")
    count = f"{len(refused.value.problems)} mistakes"
    message = sanitize_text(f"{count}\n{refused.value}")
    for words in bad.says:
        assert words in message


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: bad.name)
def test_bad_input_is_refused(bad: Bad, tiny: dict[str, Any], tmp_path: Path, tokenizer: Path) -> None:
    path = write_config(bad, tiny, tmp_path, tokenizer)
    ended = run_command(TRAIN, "--config", str(path))
    assert ended.status == bad.status, ended.err
    assert "Traceback" not in ended.err
    assert sum(line.startswith("error") for line in ended.err.splitlines()) == 1, ended.err
    for words in bad.says:
        assert words in ended.err
    assert not list((tmp_path / "run").glob("final*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: --config"),
        (["--config", "x.json", "--wrold", "2"], "unrecognized arguments: --wrold 2"),
        (["--config", "x.json", "--world", "2"], "--world N requires --dry_run or --print_config"),
        (["--config", "x.json"], "x.json: no such file"),
    ],
)
def test_invalid_command_line_is_refused(arguments: list[str], words: str) -> None:
    ended = run_command(TRAIN, *arguments)
    assert ended.status == 2
    assert words in ended.err
    assert "Traceback" not in ended.err
