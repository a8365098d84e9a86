"""Commands that README, CONTRIBUTING, docs/ and the Makefile document, and how a test runs each of them."""

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
    """Arguments to append, which shorten the run or change where it writes."""

    shorter: dict[str, str] = field(default_factory=dict)
    """Replacements of documented arguments; an empty one omits the argument."""

    world: int = 1
    status: int = 0
    says: tuple[str, ...] = ()
    """Texts that the output must contain."""

    matrix: bool = False
    """True if it takes too long for `make test`."""


_PARITY = {"all": "llama", "NAME": "llama", "--write": "", "--matrix": "", "--shapes": ""}
_QUICK = Run(add=("--quick",), matrix=True)
_REPEATED = Run(says=("finished at step 2",))
"""For a run that an earlier command has finished: the command exits at once."""

QUICKSTART = "deepspeed launch/train.py --config ds_configs/quickstart.json"
_SHORT_VALUES = (
    'data.train=[{"path": "corpus/train.jsonl"}]',
    'data.validation=[{"path": "corpus/validation.jsonl"}]',
    "data.cache_dir=cache",
    "data.sequence_length=32",
    "training.max_steps=2",
    "evaluation.max_batches=1",
    "checkpoint.every_steps=1",
)
SHORT = tuple(word for value in _SHORT_VALUES for word in ("--set", value))
"""Shortens the quickstart to two steps on a small corpus. `X.json` has the same values."""

COMMANDS: dict[str, Run] = {
    QUICKSTART: Run(add=SHORT, world=2, says=("step 2/2", "finished: the model is in runs/quickstart/final")),
    "deepspeed --num_gpus 1 launch/train.py --config ds_configs/quickstart.json": Run(
        add=SHORT, says=("finished at step 2",)
    ),
    "python launch/generate.py --run runs/quickstart --prompt 'import os'": Run(says=("import os",)),
    "python launch/generate.py --run runs/quickstart --prompt 'def ' --tokens 60": Run(says=("def ",)),
    "python launch/generate.py --run runs/NAME --checkpoint best --prompt 'import os'": Run(says=("import os",)),
    "python launch/generate.py --run runs/fine-tune --checkpoint best --prompt 'import os'": Run(says=("import os",)),
    "python launch/generate.py --path FOLDER --prompt 'import os'": Run(says=("import os",)),
    "python launch/train.py --config X.json --dry_run": Run(says=("steps", "processes")),
    "python launch/train.py --config ds_configs/quickstart-2x2x2.json --dry_run --world 8": Run(
        says=("the configuration is valid", "processes    8 = pipeline 2 x data 2 x tensor 2")
    ),
    "deepspeed launch/train.py --config mine.json": Run(world=4, status=2, says=("error: 3 mistakes",)),
    "deepspeed launch/train.py --config X.json": _REPEATED,
    "deepspeed --hostfile hosts launch/train.py --config X.json": _REPEATED,
    "torchrun --nproc_per_node 8 launch/train.py --config X.json": _REPEATED,
    "python launch/train.py --config X.json": _REPEATED,
    "python -m tools.checkpoint list runs/NAME": Run(says=("step-00000002", "latest")),
    "python -m tools.checkpoint verify runs/NAME": Run(says=("step-00000002: valid",)),
    "python -m tools.checkpoint diff A B": Run(status=1, says=("differ",)),
    "python -m tools.checkpoint export runs/NAME OUT --dtype bf16 --check": Run(says=("check passed: ",)),
    "python -m tools.checkpoint import FOLDER --config X.json": Run(
        add=("--set", "run.output_dir=runs/imported"), says=("imported; start the run",)
    ),
    "python -m tools.parity --config X.json --shrink --layouts tensor=2 tensor=4,sequence_parallel=true": Run(
        matrix=True
    ),
    "python -m tools.parity --config X.json --shrink --layouts tensor=2 tensor=2,sequence_parallel=true": Run(
        matrix=True
    ),
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
    "python -m tools.sizes": Run(add=("launch", "tools"), says=("| launch tools | ",)),
    "python -m tools.extensions ShareMemCommBuilder FusedAdamBuilder": Run(matrix=True),
    "python -m tools.extensions CPUAdamBuilder": Run(matrix=True),
}
"""By documented command, without the directory of its program. Rows are executed in this order, in a copy of the
project that has `X.json`, `mine.json`, `runs/NAME` and the other names of the pages."""

TESTED_ELSEWHERE = {"python -m tools.mutants": "tests/test_mutants.py"}
"""Documented commands that need the whole repository, and the tests that run them."""


def normalized(command: str) -> str:
    """Remove the directory of the program, comments, and explanations after two spaces; unify quotes."""
    command = re.split(r"\s{2,}|\s#", command.strip().removeprefix("$ "))[0].rstrip(".")
    program, _, rest = command.partition(" ")
    return f"{program.rpartition('/')[2]} {rest}".replace('"', "'")


def commands_of_page(text: str) -> Iterator[str]:
    """Yield the commands of a Markdown page: indented lines, fenced lines, and inline code."""
    for line in text.splitlines():
        if match := _BEGINNING.match(line.strip()):
            is_code = line.startswith("    ") or any(line in fence for fence in _FENCE.findall(text))
            if is_code:
                yield normalized(match[1] if "  " not in line.strip() else line)
    for match in _INLINE.finditer(_FENCE.sub("", text)):
        yield normalized(" ".join(match[1].split()))


def make_targets() -> list[str]:
    """Return the targets that `make help` lists."""
    printed = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    return [line.split()[0] for line in printed.stdout.splitlines()]


def commands_of_makefile() -> Iterator[str]:
    """Yield the commands that the targets run, and those that they print as advice."""
    command = ["make", "-n", "VENV=/nowhere", *make_targets()]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    for line in printed.stdout.replace("\\\n", " ").splitlines():
        plain = re.sub(r"^echo '(?:Next:)?\s*(.*)'$", r"\1", line.strip())
        if match := _BEGINNING.match(" ".join(plain.split())):
            yield normalized(match[1])


def documented_commands() -> set[str]:
    """Return the commands of all pages and the Makefile, except for installation by pip."""
    pages = {command for page in PAGES for command in commands_of_page(page.read_text(encoding="utf-8"))}
    return {command for command in pages | set(commands_of_makefile()) if not command.startswith("python -m pip ")}
