"""The results of the matrix as a page, and its totals in the README."""

from __future__ import annotations

import os
import platform
import textwrap
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path

from tools.parity.matrix import EXEMPLARY, MORE_COLUMNS, PAGES_COLUMNS, SOUND, Column, Row, is_sound, reason_of, totals
from tools.parity.text import shortened
from tools.parity.variations import FLIP, SHAPES

PAGE = Path("docs/support_matrix.md")
README = Path("README.md")
BEGIN, END = "<!-- totals of the support matrix: written by tools.parity -->", "<!-- end of the totals -->"

_REASON = 150
"""Characters of a reason in a table."""

_HEAD = """\
# Support matrix

What tensor and pipeline parallelism do with each family of transformers. A small model of the family, with every kind
of layer that its default configuration has, is sharded over the ranks; its loss and **every gradient** are compared
with the plain Hugging Face model in one process. A causal language model is also trained by `launch/train.py`: one step
in one layout, a checkpoint, one step after it was loaded in another layout, an export that `from_pretrained` reads; its
weights and its held-out loss are compared with those of a bare torch loop. No logits of it may depend on later tokens,
by the probe of that run and by the plain model with larger weights. Written by

    python -m tools.parity --families all --write

on {date} with {versions}, in fp32 on {cores} CPU cores ({system}), in {minutes} minutes in all.
For your own model, with its own sizes: `python -m tools.parity --config X.json --layouts tensor=2`.

- **right**: all gradients agree (to 1e-4 of the largest element), and the command trains the family; under tensor
  parallelism at least 90 % of the elements of the blocks' matrices are sharded, and every stage of a pipeline has
  layers of its own.
- **partly**: the same, and more than 10 % of the matrices are replicated on every rank, or over 5 % of the parameters
  get no gradient from this proof's inputs.
- **refused**: the family cannot be divided in this way, and training says so before it starts.
- **not built**: transformers cannot build a small model of the family here, or not one with the default's layers.
  Nothing is claimed about it.
- **wrong**, **failed**: a gradient or a weight differs; a rank crashed. Faults of ours.

*Sharded* is the share of the elements of the blocks' matrices that is divided among tensor ranks. *Difference* is the
largest one of a gradient, as a share of that gradient's largest element, under any column.
"""


def page(rows: list[Row], seconds: float) -> str:
    """Return the support matrix as Markdown; every row has been proven under all of `PAGES_COLUMNS`.

    Args:
        rows: Rows of all families.
        seconds: Time of all proofs.
    """
    rows = sorted(rows, key=lambda row: (row.family.model_type, row.family.task, row.family.variant))
    head = _HEAD.format(
        date=_date(),
        versions=", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "deepspeed")),
        cores=os.cpu_count(),
        system=f"{platform.system()} {platform.machine()}",
        minutes=round(seconds / 60),
    )
    titles = " | ".join(str(column) for column in PAGES_COLUMNS)
    lines = [
        head,
        "| | families | outcomes |",
        "| --- | --: | --- |",
        *_totals_by_task(rows),
        "",
        f"| family | task | {titles} | trained | other shapes | sharded | difference | replicated, or why not |",
        f"| --- | --- |{' --- |' * len(PAGES_COLUMNS)} --- | --- | --: | --: | --- |",
        *map(_line, rows),
        "",
        *_shapes(rows),
    ]
    return "\n".join(lines) + "\n"


def _totals_by_task(rows: list[Row]) -> Iterator[str]:
    for column in PAGES_COLUMNS:
        for task in dict.fromkeys(row.family.task for row in rows):
            outcomes = [row.outcome(column) for row in rows if row.family.task == task]
            yield f"| {column}: {_cell(task)} | {len(outcomes)} | {totals(outcomes)} |"
    trained = [row.training.outcome for row in rows if row.training is not None]
    yield f"| trained by launch/train.py | {len(trained)} | {totals(trained)} |"


def _line(row: Row) -> str:
    proven = [v for v in row.generic.values() if v.outcome in (*SOUND, "wrong")]
    first = next(iter(row.generic.values()))
    name = f"{row.family.model_type} ({row.family.variant})" if row.family.variant else row.family.model_type
    cells = [
        _cell(name),
        _cell(row.family.task),
        *(row.outcome(column) for column in row.generic),
        row.training.outcome if row.training else "",
        totals([verdict.outcome for verdict in row.shapes.values()]),
        f"{first.share_cut:.0%}" if first in proven else "",
        f"{max(v.worst for v in proven):.0e}" if proven else "",
        _cell(shortened(_explained(row), _REASON)),
    ]
    return "| " + " | ".join(cells) + " |"


def _explained(row: Row) -> str:
    """Return the replicated matrices with reasons, or the reason why there is no proof, on one line."""
    first = next(iter(row.generic.values()))
    if first.outcome not in SOUND:
        return reason_of(first)
    parts = []
    if row.training is not None and row.training.outcome not in SOUND:
        parts.append(f"training: {reason_of(row.training)}")
    for column, verdict in list(row.generic.items())[1:]:
        reason = reason_of(verdict)
        if verdict.outcome not in SOUND and not any(reason in part for part in parts):
            parts.append(f"{column}: {reason}")
    reasons: dict[str, list[str]] = {}
    for name, reason in first.whole.items():
        reasons.setdefault(reason, []).append(name.rpartition("*.")[2].removesuffix(".weight"))
    parts += [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
    if first.share_without_gradient > 0.05:
        parts.append(f"{first.share_without_gradient:.0%} of the parameters get no gradient in this proof")
    return "; ".join(parts)


def _shapes(rows: list[Row]) -> Iterator[str]:
    """Yield the outcomes in the other shapes, and the shapes that are not right."""
    yield "## Other shapes"
    yield ""
    yield textwrap.fill(
        "Each family is also proven with one key/value head (or the fewest that it can have) and with two, with heads "
        "of another width than hidden size / heads, with widths and a vocabulary that do not divide evenly, with ties "
        "and biases reversed, and with every boolean of its configuration flipped that changes the set of weights; in "
        f"one way of sharding it, and for {len(EXEMPLARY)} families ({', '.join(EXEMPLARY)}) in all of "
        f"{', '.join(map(str, (*PAGES_COLUMNS, *MORE_COLUMNS)))}.",
        118,
    )
    yield ""
    yield "| shape | families | proofs | outcomes |"
    yield "| --- | --: | --: | --- |"
    for shape in (*SHAPES[1:], FLIP):
        outcomes = [(row, v.outcome) for row in rows for (s, _), v in row.shapes.items() if s.startswith(shape)]
        label = "a boolean flipped" if shape == FLIP else shape
        families = {str(row.family) for row, _ in outcomes}
        yield f"| {label} | {len(families)} | {len(outcomes)} | {totals([outcome for _, outcome in outcomes])} |"
    yield ""
    yield "Those that are not right:"
    yield ""
    yield "| family | shape | divided | outcome | reason |"
    yield "| --- | --- | --- | --- | --- |"
    for row in rows:
        for (shape, column), verdict in row.shapes.items():
            same = row.generic.get(column)
            if verdict.outcome in SOUND or (same is not None and same.outcome == verdict.outcome == "refused"):
                continue
            reason = _cell(shortened(reason_of(verdict), _REASON))
            yield f"| {_cell(str(row.family))} | {_cell(shape)} | {column} | {verdict.outcome} | {reason} |"


def readme_totals(rows: list[Row]) -> str:
    """Return the sentences of the README that count the proven families."""
    causal = [row for row in rows if row.family.task == "causal_lm"]
    others = [row for row in rows if row.family.task != "causal_lm"]
    varied = [verdict.outcome for row in rows for verdict in row.shapes.values()]

    def right(chosen: list[Row], column: Column) -> int:
        return sum(row.outcome(column) == "right" for row in chosen)

    tensor, sequence, pipeline, both = PAGES_COLUMNS
    trained = sum(row.training is not None and row.training.outcome in SOUND for row in causal)
    text = (
        f"Of {len(causal)} causal language models of transformers {version('transformers')} (variants counted) "
        f"{right(causal, tensor)} pass under tensor 2, {right(causal, sequence)} with sequence "
        f"parallelism, {right(causal, pipeline)} in 2 pipeline stages and {right(causal, both)} under tensor 2 x "
        f"pipeline 2: every gradient compared with one process. {trained} of them were trained, resumed in another "
        f"layout and exported by the command. Of {len(others)} encoders and encoder-decoders, which no task trains "
        f"yet, {right(others, tensor)}, {right(others, sequence)}, {right(others, pipeline)} "
        f"and {right(others, both)} have every gradient right. "
        f"{len(varied)} more proofs vary heads, widths, ties, biases and every boolean that changes the set of "
        f"weights: {totals(varied)}. {_rest(rows)} (`docs/support_matrix.md`, {_date()}; "
        "`python -m tools.parity --families all --write` regenerates them.)"
    )
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _rest(rows: list[Row]) -> str:
    """Return the reasons of the families that are not right."""
    if not is_sound(rows):
        return "Wrong and failed families are listed with the reason."
    return (
        "Partly means that more than a tenth of the matrices is replicated; a refused family is rejected before "
        "training starts, with the reason; families that cannot be built are not verified."
    )


def write(rows: list[Row], seconds: float) -> None:
    """Write the page, and the totals between their marks in the README."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(rows, seconds))
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{readme_totals(rows)}\n{END}{rest.partition(END)[2]}")
    print(f"written: {PAGE} and the totals in {README}")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_").replace("<", "&lt;")


def _date() -> str:
    today = date.today()
    return f"{today.day} {today:%B %Y}"
