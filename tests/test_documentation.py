"""What the pages state about keys, files, packages and results is true of the repository."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from tests.configs import with_values
from tests.documented_commands import PAGES, ROOT
from trainer.config.hints import TARGETS
from trainer.config.load import check_config
from trainer.errors import TesseraError

pytestmark = pytest.mark.fast

DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def page(name: str) -> str:
    """Read a page of docs/."""
    return (DOCS / name).read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub derives them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def rows_of(text: str) -> Iterator[list[str]]:
    """Yield the cells of the rows of all tables of a page, without their headers."""
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        for line in table.splitlines()[2:]:
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_paths_in_pages_exist(path: Path) -> None:
    for name in re.findall(r"`((?:trainer|launch|tools|tests|ds_configs|docs)/[\w./-]*)`", path.read_text()):
        assert (ROOT / name).exists(), name


def test_index_lists_every_page() -> None:
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", page("README.md")))
    assert listed == {path.name for path in DOCS.glob("*.md")} - {"README.md"}


@pytest.mark.parametrize("text", [README, page("configuring.md")], ids=["README.md", "configuring.md"])
def test_examples_are_valid_configurations(text: str, tiny: dict[str, Any], corpus: Path) -> None:
    """With a small model and corpus in place of those of the example."""
    (block,) = [block for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL) if '"run"' in block]
    example = json.loads(block)
    example["model"].pop("path")
    example["model"] |= {"config": {**tiny["model"]["config"], "max_position_embeddings": 4096}, "initialize": None}
    example = with_values(
        example,
        run__output_dir=tiny["run"]["output_dir"],
        data__train=tiny["data"]["train"],
        deepspeed__bf16=None,
        deepspeed__fp16=None,
    )
    if "path" in example["data"]["validation"][0]:
        example = with_values(example, data__validation=[{"path": str(corpus / "validation.jsonl")}])
    assert (
        check_config(example, world_size=4, device="cpu").config.data.sequence_length
        == example["data"]["sequence_length"]
    )


def documented_keys() -> set[str]:
    """Return the dotted keys of docs/configuration.md."""
    keys = set()
    for section, body in re.findall(r"^##+ ([a-z_.0-9]+)\n(.*?)(?=^##|\Z)", page("configuration.md"), re.M | re.S):
        keys |= {f"{section}.{cells[0].strip('`')}" for cells in rows_of(body)} | {section}
    return keys


FREE = ("deepspeed.optimizer.params.", "deepspeed.scheduler.params.")
"""Sections whose keys are the parameters of a class."""


@pytest.mark.parametrize("cells", list(rows_of(page("coming-from.md"))), ids=lambda cells: cells[0])
def test_keys_of_other_trainers_name_existing_keys(cells: list[str]) -> None:
    names, target = re.findall(r"`([\w.]+)[^`]*`", cells[0]), cells[1].strip("`")
    if not target:
        assert cells[2], "neither a key nor a reason"
        return
    assert target in documented_keys() or target.startswith(FREE)
    for name in names:
        assert TARGETS.get(name, target) == target, "a configuration with this key is answered with another one"


def test_keys_of_hugging_face_trainer_exist() -> None:
    section = page("coming-from.md").partition("## Hugging Face Trainer")[2].partition("\n## ")[0]
    names = {name for cells in rows_of(section) for name in re.findall(r"`(\w+)`", cells[0])}
    assert len(names) > 25
    assert names <= {field.name for field in fields(TrainingArguments)}


def test_readme_totals_agree_with_support_matrix() -> None:
    outcomes = {
        cells[0].replace("\\", ""): cells[1:] for cells in rows_of(page("support_matrix.md")) if len(cells) == 3
    }
    sentence = " ".join(README.split())

    def right(column: str) -> str:
        found = re.match(r"(\d+) right", outcomes[f"{column}: causal_lm"][1])
        return found[1] if found else "0"

    assert f"Of {outcomes['tensor 2: causal_lm'][0]} causal language models" in sentence
    assert f"{right('tensor 2')} pass under tensor 2" in sentence
    assert f"{right('tensor 2, sequence parallel')} with sequence parallelism" in sentence
    assert f"{right('pipeline 2')} in 2 pipeline stages" in sentence
    assert f"and {right('tensor 2 x pipeline 2')} under tensor 2 x pipeline 2" in sentence


def test_exit_statuses_are_documented() -> None:
    documented = {cells[0] for cells in rows_of(page("running.md")) if len(cells) == 2}
    classes = [TesseraError]
    for error in classes:
        classes += error.__subclasses__()
    assert {str(error.exit_status) for error in classes[1:] if error.exit_status != 1} <= documented


def test_package_figure_matches_import_rules() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    expected = [[name.strip().removeprefix("trainer.") for name in layer.split("|")] for layer in layers]
    figure = page("architecture.md").partition("## Packages")[2].split("```")[1].strip("\n")
    lines = [line.partition("  ")[0] for line in figure.splitlines() if not line.startswith(" ")]
    assert [line.split(", ") for line in lines] == expected


def test_quoted_messages_are_printed_by_the_code() -> None:
    """Code in the first column of tables of messages occurs in string literals of the trainer or the launcher."""
    literals = []
    for path in (*(ROOT / "trainer").rglob("*.py"), *(ROOT / "launch").glob("*.py")):
        strings = (node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
        literals += [value for value in strings if isinstance(value, str)]
    tables = re.findall(r"\| the (?:log|message) contains \|.*\n(?:\|.*\n)+", page("troubleshooting.md"))
    quoted = [words for table in tables for cells in rows_of(table) for words in re.findall(r"`([^`]+)`", cells[0])]
    assert len(quoted) > 10
    assert [words for words in quoted if not any(words in literal for literal in literals)] == []
