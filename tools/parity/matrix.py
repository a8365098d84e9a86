"""The support matrix: every family of the table, proven one by one, and written down as a page."""

from __future__ import annotations

import os
import platform
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path

from tools.parity.families import FAMILIES, Family
from tools.parity.proof import Verdict, prove
from tools.ranks import run_ranks
from trainer.errors import ConfigError, Problem

PAGE = Path("docs/support_matrix.md")
OUTCOMES = ("right", "partly", "wrong", "refused", "not built", "failed")
BAD = ("wrong", "failed")
"""Outcomes that are faults of ours."""

_REASON = 150
"""Characters of a reason in the table."""


@dataclass(frozen=True)
class Column:
    """One way of dividing a model, of which the matrix has a column."""

    tensor: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline

    def __str__(self) -> str:
        axes = [f"{axis} {size}" for axis, size in (("tensor", self.tensor), ("pipeline", self.pipeline)) if size > 1]
        return " x ".join(axes) + ", sequence parallel" * self.sequence_parallel


PAGES_COLUMNS = (Column(2), Column(2, sequence_parallel=True), Column(pipeline=2), Column(2, 2))
"""What the page shows; the first one says how much of a model is cut."""


@dataclass(frozen=True)
class Row:
    """What was found about one family, by way of dividing it."""

    family: Family
    found: dict[Column, Verdict]

    @property
    def verdicts(self) -> list[Verdict]:
        return list(self.found.values())


def chosen(names: list[str]) -> list[Family]:
    """The families of the table called `names`: a model type means all its rows, `all` the whole table.

    Raises:
        ConfigError: naming every name that is not in it.
    """
    if names == ["all"]:
        return FAMILIES
    known = {str(family) for family in FAMILIES} | {family.model_type for family in FAMILIES}
    problems = []
    for name in names:
        if name not in known:
            near = get_close_matches(name, sorted(known), n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            problems.append(
                Problem(
                    "--families",
                    f"'{name}' is not in the table{hint}",
                    "" if near else "Give names of tools/parity/families.py, or 'all'",
                )
            )
    if problems:
        raise ConfigError(problems)
    return [family for family in FAMILIES if family.model_type in names or str(family) in names]


def _prove(family: Family, column: Column) -> Verdict:
    return prove([family], sequence_parallel=column.sequence_parallel, pipeline=column.pipeline)[0]


def _verdict(family: Family, column: Column) -> Verdict:
    """The proof of one family in ranks of its own; a rank that crashes is the family's verdict."""
    try:
        verdict: Verdict = run_ranks(_prove, column.world, family, column)[0]
    except AssertionError as error:
        return Verdict(str(family), column.world, "failed", last_line(str(error)))
    return verdict


def last_line(report: str) -> str:
    """The exception's own line in a rank's report, behind which its output may follow."""
    lines = [line for line in report.splitlines() if line.strip()]
    inside = [n for n, line in enumerate(lines) if line.startswith("  ")]
    after = lines[inside[-1] + 1 :] if inside else lines
    return (after or lines or ["no message"])[0].strip()


def prove_all(families: list[Family], columns: Sequence[Column]) -> Iterator[Row]:
    """Proves the families one by one, each divided in every way, with a line each."""
    began = time.monotonic()
    width = max(len(str(family)) for family in families)
    for number, family in enumerate(families, start=1):
        row = Row(family, {column: _verdict(family, column) for column in columns})
        spent = time.monotonic() - began
        left = spent / number * (len(families) - number)
        outcomes = " / ".join(v.outcome for v in row.verdicts)
        print(f"[{number:{len(str(len(families)))}}/{len(families)}] {_clock(left)} left  {family!s:{width}}  "
              f"{outcomes}{_remark(row)}", flush=True)  # fmt: skip
        yield row


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _remark(row: Row) -> str:
    reasons = dict.fromkeys(_reason(v) for v in row.verdicts if v.outcome not in ("right", "partly") and v.reason)
    worst = max((v.worst for v in row.verdicts), default=0.0)
    if any(v.outcome == "wrong" for v in row.verdicts):
        reasons[f"largest difference {worst:.1e}"] = None
    return "  " + shortened("; ".join(reasons), 100) if reasons else ""


def _reason(verdict: Verdict) -> str:
    """Of a refusal without the key, which every one of them names."""
    key, colon, rest = verdict.reason.partition(": ")
    return rest if colon and key.startswith("parallel.") else verdict.reason


def shortened(text: str, width: int) -> str:
    """`text` on one line of at most `width` characters, cut between words."""
    return textwrap.shorten(text, width, placeholder=" ...")


def totals(verdicts: list[Verdict]) -> str:
    """How many came out how, in words."""
    count = Counter(verdict.outcome for verdict in verdicts)
    return ", ".join(f"{count[outcome]} {outcome}" for outcome in OUTCOMES if count[outcome])


def _explained(row: Row) -> str:
    """What stays whole and why, or why there is no proof; on one line."""
    first = row.verdicts[0]
    if first.outcome not in ("right", "partly"):
        return _reason(first)
    parts = []
    for column, verdict in list(row.found.items())[1:]:
        reason = _reason(verdict)
        if verdict.outcome not in ("right", "partly") and not any(reason in part for part in parts):
            parts.append(f"{column}: {reason}")
    reasons: dict[str, list[str]] = {}
    for name, reason in first.whole.items():
        reasons.setdefault(reason, []).append(name.rpartition("*.")[2].removesuffix(".weight"))
    parts += [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
    if first.share_without_gradient > 0.05:
        parts.append(f"{first.share_without_gradient:.0%} of the parameters get no gradient in this proof")
    return "; ".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_").replace("<", "&lt;")


def _line(row: Row) -> str:
    proven = [v for v in row.verdicts if v.outcome in ("right", "partly", "wrong")]
    name = f"{row.family.model_type} ({row.family.variant})" if row.family.variant else row.family.model_type
    cells = [
        _cell(name),
        _cell(row.family.task),
        *(v.outcome for v in row.verdicts),
        f"{row.verdicts[0].share_cut:.0%}" if row.verdicts[0] in proven else "",
        f"{max(v.worst for v in proven):.0e}" if proven else "",
        _cell(shortened(_explained(row), _REASON)),
    ]
    return "| " + " | ".join(cells) + " |"


def page(rows: list[Row]) -> str:
    """The support matrix as Markdown; every row has been proven under all of `PAGES_COLUMNS`."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "deepspeed"))
    rows = sorted(rows, key=lambda row: (row.family.model_type, row.family.task, row.family.variant))
    lines = [
        "# Support matrix",
        "",
        "What tensor and pipeline parallelism do with each family of transformers. A small model of the family, with",
        "every kind of layer that its default configuration has, is divided over the ranks; its loss and **every",
        "gradient** are compared with the plain Hugging Face model in one process. Written by",
        "",
        "    python -m tools.parity --families all --write",
        "",
        f"on {_date()} with {versions}, in fp32 on {os.cpu_count()} CPU cores "
        f"({platform.system()} {platform.machine()}).",
        "For your own model, with its own sizes: `python -m tools.parity --config X.json --layouts tensor=2`.",
        "",
        "- **right**: all gradients agree (to 1e-4 of the largest element); under tensor parallelism at least 90 % of",
        "  the elements of the blocks' matrices are cut, and every stage of a pipeline has layers of its own.",
        "- **partly**: all gradients agree; more than 10 % of the matrices stay whole on every rank, or over 5 %",
        "  of the parameters get no gradient from this proof's inputs.",
        "- **refused**: the family cannot be divided so, and training says so before it starts.",
        "- **not built**: transformers cannot build a small model of the family here, or not one with the default's",
        "  layers. Nothing is claimed about it.",
        "- **wrong**, **failed**: a gradient differs; a rank crashed. Faults of ours.",
        "",
        "*Cut* is the share of the elements of the blocks' matrices that is divided among tensor ranks. *Difference*",
        "is the largest one of a gradient, as a share of that gradient's largest element, under any column.",
        "",
        "| | families | outcomes |",
        "| --- | --: | --- |",
    ]
    for column in PAGES_COLUMNS:
        for task in dict.fromkeys(row.family.task for row in rows):
            own = [row.found[column] for row in rows if row.family.task == task]
            lines.append(f"| {column}: {_cell(task)} | {len(own)} | {totals(own)} |")
    titles = " | ".join(str(column) for column in PAGES_COLUMNS)
    lines += [
        "",
        f"| family | task | {titles} | cut | difference | whole, or why not |",
        f"| --- | --- |{' --- |' * len(PAGES_COLUMNS)} --: | --: | --- |",
        *map(_line, rows),
    ]
    return "\n".join(lines) + "\n"


def _date() -> str:
    today = date.today()
    return f"{today.day} {today:%B %Y}"


def run(names: list[str], column: Column, *, write: bool) -> int:
    """Proves the families called `names` divided as `column` says; with `write`, in all ways of the page, and writes
    that. 1 if any is wrong."""
    columns = PAGES_COLUMNS if write else (column,)
    rows = list(prove_all(chosen(names), columns))
    for one in columns:
        print(f"{one}: {totals([row.found[one] for row in rows])}")
    if write:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(rows))
        print(f"written: {PAGE}")
    return int(any(v.outcome in BAD for row in rows for v in row.verdicts))
