"""Every command that README, CONTRIBUTING, docs/ and the Makefile tell a user to type, and how a test runs it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))

_PROGRAMS = r"(?:\S*/)?(?:deepspeed|torchrun|python|make)"
_BEGINNING = re.compile(rf"(?:\$ )?({_PROGRAMS}(?: \S+)+)")
_INLINE = re.compile(rf"`({_PROGRAMS}\s[^`]+)`")
_FENCE = re.compile(r"```.*?```", re.DOTALL)


@dataclass(frozen=True)
class Run:
    """How a test runs a documented command."""

    add: tuple[str, ...] = ()
    """Arguments that make it short, or write somewhere else."""

    shorter: dict[str, str] = field(default_factory=dict)
    """Arguments in place of documented ones; an empty one leaves the argument out."""

    world: int = 1
    status: int = 0
    says: tuple[str, ...] = ()
    """In what it prints."""

    matrix: bool = False
    """Whether it takes too long for `make test`."""


_PARITY = {"all": "llama", "NAME": "llama", "--write": "", "--matrix": "", "--shapes": ""}
_QUICK = Run(add=("--quick",), matrix=True)
_AGAIN = Run(says=("finished at step 2",))
"""Of a run that the first row has finished: the command is understood, and there is nothing left to do."""

QUICKSTART = "deepspeed launch/train.py --config ds_configs/quickstart.json"
SHORT = (
    "--set", "data.train=[{\"path\": \"corpus/train.jsonl\"}]", "--set", "data.cache_dir=cache",
    "--set", "data.validation=[{\"path\": \"corpus/validation.jsonl\"}]", "--set", "data.sequence_length=32",
    "--set", "training.max_steps=2", "--set", "evaluation.max_batches=1", "--set", "checkpoint.every_steps=1",
)  # fmt: skip
"""Of the quickstart: two steps on a small text. `X.json` holds the same."""

COMMANDS: dict[str, Run] = {
    QUICKSTART: Run(add=SHORT, world=2, says=("step 2/2", "finished: the model is in runs/quickstart/final")),
    "deepspeed --num_gpus 1 launch/train.py --config ds_configs/quickstart.json":
        Run(add=SHORT, says=("finished at step 2",)),
    "python launch/generate.py --run runs/quickstart --prompt 'import os'": Run(says=("import os",)),
    "python launch/generate.py --run runs/quickstart --prompt 'def ' --tokens 60": Run(says=("def ",)),
    "python launch/generate.py --run runs/NAME --checkpoint best --prompt 'import os'": Run(says=("import os",)),
    "python launch/generate.py --path FOLDER --prompt 'import os'": Run(says=("import os",)),
    "python launch/train.py --config ds_configs/quickstart-2x2x2.json --dry_run --world 8":
        Run(says=("the configuration is sound", "processes    8 = pipeline 2 x data 2 x tensor 2")),
    "deepspeed launch/train.py --config mine.json": Run(world=4, status=2, says=("error: 3 mistakes",)),
    "deepspeed launch/train.py --config X.json": _AGAIN,
    "deepspeed --hostfile hosts launch/train.py --config X.json": _AGAIN,
    "torchrun --nproc_per_node 8 launch/train.py --config X.json": _AGAIN,
    "python launch/train.py --config X.json": _AGAIN,
    "python -m tools.checkpoint list runs/NAME": Run(says=("step-00000002", "latest")),
    "python -m tools.checkpoint verify runs/NAME": Run(says=("step-00000002: sound",)),
    "python -m tools.checkpoint diff A B": Run(status=1, says=("differ",)),
    "python -m tools.checkpoint export runs/NAME OUT --dtype bf16 --check": Run(says=("check passed: ",)),
    "python -m tools.checkpoint import FOLDER --config X.json":
        Run(add=("--set", "run.output_dir=runs/imported"), says=("the run begins with these weights",)),
    "python -m tools.parity --config X.json --shrink --layouts tensor=2 tensor=4,sequence_parallel=true":
        Run(matrix=True),
    "python -m tools.parity --config X.json --shrink --layouts tensor=2 tensor=2,sequence_parallel=true":
        Run(matrix=True),
    "python -m tools.parity --config X.json --layouts tensor=2": Run(matrix=True),
    "python -m tools.parity --families all --write": Run(shorter=_PARITY, matrix=True),
    "python -m tools.parity --families NAME --matrix": Run(shorter=_PARITY, matrix=True),
    "python -m tools.parity --families NAME --pipeline 2": Run(shorter=_PARITY, matrix=True),
    "python -m tools.parity --families NAME": Run(shorter=_PARITY, matrix=True),
    "python -m tools.bench overhead": _QUICK,
    "python -m tools.bench states": _QUICK,
    "python -m tools.bench data": _QUICK,
    "python -m tools.bench traffic": _QUICK,
    "python -m tools.bench pipeline": _QUICK,
    "python -m tools.bench checkpoint": Run(add=("--quick", "--folder", "."), matrix=True),
    "python -m tools.bench replicas": _QUICK,
    "python -m tools.bench guards": _QUICK,
    "python -m tools.schema": Run(says=("ds_configs/schema.json", "docs/configuration.md")),
    "python -m tools.extensions ShareMemCommBuilder FusedAdamBuilder": Run(matrix=True),
    "python -m tools.extensions CPUAdamBuilder": Run(matrix=True),
}  # fmt: skip
"""By the command as documented, without the folder of its program. Run in this order, in a copy of the project where
`X.json`, `mine.json`, `runs/NAME` and the other names of the pages are."""


def normalized(command: str) -> str:
    """Without the folder of the program, comments, explanations after two spaces, and variants of quoting."""
    command = re.split(r"\s{2,}|\s#", command.strip().removeprefix("$ "))[0].rstrip(".")
    program, _, rest = command.partition(" ")
    return f"{program.rpartition('/')[2]} {rest}".replace('"', "'")


def commands_of_page(text: str) -> Iterator[str]:
    """The commands of a Markdown page: indented or fenced lines, and code within a paragraph."""
    for line in text.splitlines():
        if found := _BEGINNING.match(line.strip()):
            is_code = line.startswith("    ") or any(line in fence for fence in _FENCE.findall(text))
            if is_code:
                yield normalized(found[1] if "  " not in line.strip() else line)
    for found in _INLINE.finditer(_FENCE.sub("", text)):
        yield normalized(" ".join(found[1].split()))


def make_targets() -> list[str]:
    """What `make help` lists."""
    printed = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    return [line.split()[0] for line in printed.stdout.splitlines()]


def commands_of_makefile() -> Iterator[str]:
    """The commands that the targets run, and those that they print as advice."""
    printed = subprocess.run(["make", "-n", "VENV=/nowhere", *make_targets()], cwd=ROOT, capture_output=True, text=True,
                             check=True, timeout=60)  # fmt: skip
    for line in printed.stdout.replace("\\\n", " ").splitlines():
        plain = re.sub(r"^echo '(?:Next:)?\s*(.*)'$", r"\1", line.strip())
        if found := _BEGINNING.match(" ".join(plain.split())):
            yield normalized(found[1])


def documented_commands() -> set[str]:
    """Of all pages and the Makefile, but for installation by pip."""
    pages = {command for page in PAGES for command in commands_of_page(page.read_text(encoding="utf-8"))}
    return {command for command in pages | set(commands_of_makefile()) if not command.startswith("python -m pip ")}
