"""The support matrix: every family of the table, proven one by one, and written down as a page."""

from __future__ import annotations

import os
import platform
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
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
class Row:
    """What was found about one family: with the sequence whole, and with it cut; None where that was not asked."""

    family: Family
    whole: Verdict | None
    cut: Verdict | None

    @property
    def verdicts(self) -> list[Verdict]:
        return [verdict for verdict in (self.whole, self.cut) if verdict is not None]


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


def _prove(family: Family, sequence_parallel: bool) -> Verdict:
    return prove([family], sequence_parallel=sequence_parallel)[0]


def _verdict(family: Family, tensor: int, sequence_parallel: bool) -> Verdict:
    """The proof of one family in ranks of its own; a rank that crashes is the family's verdict."""
    try:
        verdict: Verdict = run_ranks(_prove, tensor, family, sequence_parallel)[0]
    except AssertionError as error:
        return Verdict(str(family), tensor, "failed", last_line(str(error)))
    return verdict


def last_line(report: str) -> str:
    """The exception's own line in a rank's report, behind which its output may follow."""
    lines = [line for line in report.splitlines() if line.strip()]
    inside = [n for n, line in enumerate(lines) if line.startswith("  ")]
    after = lines[inside[-1] + 1 :] if inside else lines
    return (after or lines or ["no message"])[0].strip()


def prove_all(families: list[Family], tensor: int, columns: list[bool]) -> Iterator[Row]:
    """Proves the families one by one, with a line each.

    Args:
        tensor: ranks that share each model.
        columns: values of `sequence_parallel` to prove under.
    """
    began = time.monotonic()
    width = max(len(str(family)) for family in families)
    for number, family in enumerate(families, start=1):
        found = {sequence: _verdict(family, tensor, sequence) for sequence in columns}
        row = Row(family, found.get(False), found.get(True))
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
    whole = row.whole
    assert whole is not None
    if whole.outcome not in ("right", "partly"):
        return _reason(whole)
    parts = []
    if row.cut is not None and row.cut.outcome not in ("right", "partly"):
        parts.append(f"sequence_parallel: {_reason(row.cut)}")
    reasons: dict[str, list[str]] = {}
    for name, reason in whole.whole.items():
        reasons.setdefault(reason, []).append(name.rpartition("*.")[2].removesuffix(".weight"))
    parts += [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
    if whole.share_without_gradient > 0.05:
        parts.append(f"{whole.share_without_gradient:.0%} of the parameters get no gradient in this proof")
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
        f"{proven[0].share_cut:.0%}" if proven else "",
        f"{max(v.worst for v in proven):.0e}" if proven else "",
        _cell(shortened(_explained(row), _REASON)),
    ]
    return "| " + " | ".join(cells) + " |"


def page(rows: list[Row], tensor: int) -> str:
    """The support matrix as Markdown; every row has been proven under both columns."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "deepspeed"))
    rows = sorted(rows, key=lambda row: (row.family.model_type, row.family.task, row.family.variant))
    lines = [
        "# Support matrix",
        "",
        f"What tensor parallelism does with each family of transformers, on {tensor} tensor ranks. A small model of",
        "the family, with every kind of layer that its default configuration has, is cut over the ranks; its loss and",
        "**every gradient** are compared with the plain Hugging Face model in one process. Written by",
        "",
        f"    python -m tools.parity --families all --tensor {tensor} --write",
        "",
        f"on {_date()} with {versions}, in fp32 on {os.cpu_count()} CPU cores "
        f"({platform.system()} {platform.machine()}).",
        "For your own model, with its own sizes: `python -m tools.parity --config X.json --layouts tensor=2`.",
        "",
        "- **right**: all gradients agree (to 1e-4 of the largest element), and at least 90 % of the elements of",
        "  the blocks' matrices are cut.",
        "- **partly**: all gradients agree; more than 10 % of the matrices stay whole on every rank, or over 5 %",
        "  of the parameters get no gradient from this proof's inputs.",
        "- **refused**: the plan does not fit the model, and training says so before it starts.",
        "- **not built**: transformers cannot build a small model of the family here, or not one with the default's",
        "  layers. Nothing is claimed about it.",
        "- **wrong**, **failed**: a gradient differs; a rank crashed. Faults of ours.",
        "",
        "*Cut* is the share of the elements of the blocks' matrices that is divided among the ranks. *Difference* is",
        "the largest one of a gradient, as a share of that gradient's largest element, under either column.",
        "",
        "| | families | outcomes |",
        "| --- | --: | --- |",
    ]
    for column, verdicts in (
        (f"tensor {tensor}", [row.whole for row in rows]),
        (f"tensor {tensor}, sequence_parallel", [row.cut for row in rows]),
    ):
        for task in dict.fromkeys(row.family.task for row in rows):
            own = [v for row, v in zip(rows, verdicts, strict=True) if v is not None and row.family.task == task]
            lines.append(f"| {_cell(f'{column}: {task}')} | {len(own)} | {totals(own)} |")
    lines += [
        "",
        f"| family | task | tensor {tensor} | with sequence\\_parallel | cut | difference | whole, or why not |",
        "| --- | --- | --- | --- | --: | --: | --- |",
        *map(_line, rows),
    ]
    return "\n".join(lines) + "\n"


def _date() -> str:
    today = date.today()
    return f"{today.day} {today:%B %Y}"


def run(names: list[str], tensor: int, *, sequence_parallel: bool, write: bool) -> int:
    """Proves the families called `names`; with `write`, under both columns, and writes the page. 1 if any is wrong."""
    families = chosen(names)
    columns = [False, True] if write else [sequence_parallel]
    rows = list(prove_all(families, tensor, columns))
    for sequence in columns:
        found = [verdict for row in rows if (verdict := row.cut if sequence else row.whole) is not None]
        print(f"tensor={tensor}{',sequence_parallel=true' if sequence else ''}: {totals(found)}")
    if write:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(rows, tensor))
        print(f"written: {PAGE}")
    return int(any(v.outcome in BAD for row in rows for v in row.verdicts))
