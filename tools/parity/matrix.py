"""The support matrix: every family of the table in every shape, in several layouts, proven cell by cell.

It is not the full product. Every family is proven in its generic shape in all columns, and through `launch/train.py`;
every other shape in one column that shards it; the families of `EXEMPLARY` in all shapes and all columns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from tools.parity.families import FAMILIES, Family
from tools.parity.gradient_proof import Verdict, prove, prove_causality, prove_likeness
from tools.parity.layout import Layout, parse_layout
from tools.parity.results import Key, Results
from tools.parity.text import clock, last_line
from tools.parity.training_proof import prove_training, tiny_model
from tools.parity.variations import GENERIC, Variation
from tools.ranks import run_ranks
from trainer.errors import ConfigError, Problem, suggest

OUTCOMES = ("right", "partly", "wrong", "refused", "not built", "failed")
SOUND = ("right", "partly")
BAD = ("wrong", "failed")
"""Outcomes that are faults of ours."""

LIKENESS, TRAINING, CAUSALITY = "like the default", "training", "causality"
"""Names of the cells in which a family's tiny model is compared with its default, is trained by the command, and must
not see later tokens."""

SEES = "sees later tokens"
"""Text in every refusal of a model that is not causal."""

EXEMPLARY = (
    "bloom",
    "cohere",
    "deepseek_v3",
    "falcon",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "jamba",
    "llama",
    "mamba2",
    "mixtral",
    "olmo2",
    "opt",
    "phi3",
    "qwen3",
    "qwen3_next",
    "starcoder2",
)
"""Families that are proven in every shape and every column."""


@dataclass(frozen=True)
class Column:
    """A layout of the model, which is a column of the matrix."""

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
"""Columns of the page; the first one shows how much of a model is sharded."""

MORE_COLUMNS = (Column(4),)
"""Additional columns of the exemplary families: fewer key/value heads than ranks."""


@dataclass
class Row:
    """The results for one family."""

    family: Family
    generic: dict[Column, Verdict] = field(default_factory=dict)
    """Verdicts in the generic shape."""

    training: Verdict | None = None
    """Verdict of the run through `launch/train.py`; None if no task trains the family."""

    causality: Verdict | None = None
    """Whether its logits depend on later tokens; `refused` if they do, and training refuses the family."""

    shapes: dict[tuple[str, Column], Verdict] = field(default_factory=dict)
    """Verdicts in the other shapes."""

    def outcome(self, column: Column) -> str:
        """Return the outcome of a column; right only if the command also trains the family, and it is causal."""
        outcome = self.generic[column].outcome
        for verdict in (self.causality, self.training):
            if outcome in SOUND and verdict is not None and verdict.outcome not in (*SOUND, "not built"):
                return verdict.outcome
        return outcome

    @property
    def verdicts(self) -> list[Verdict]:
        others = [verdict for verdict in (self.training, self.causality) if verdict is not None]
        return [*self.generic.values(), *others, *self.shapes.values()]


def chosen(names: list[str]) -> list[Family]:
    """Return the families called `names`: a model type means all its rows, `all` the full table.

    Raises:
        ConfigError: naming every name that is not in it.
    """
    if names == ["all"]:
        return FAMILIES
    known = {str(family) for family in FAMILIES} | {family.model_type for family in FAMILIES}
    problems = []
    for name in names:
        if name not in known:
            hint = suggest(name, known)
            remedy = "" if hint else "Give names of tools/parity/families.py, or 'all'"
            problems.append(Problem("--families", f"'{name}' is not in the table{hint}", remedy))
    if problems:
        raise ConfigError(problems)
    return [family for family in FAMILIES if family.model_type in names or str(family) in names]


def _prove(families: list[Family], column: Column) -> list[Verdict]:
    # A tiny model is compared with the default once per family, not in each cell: the default model is large.
    return prove(families, like_default=False, sequence_parallel=column.sequence_parallel, pipeline=column.pipeline)


def _verdicts(families: list[Family], column: Column) -> list[Verdict]:
    """Proofs in separate ranks; a crash of a rank is the verdict of its current family."""
    if not families:
        return []
    try:
        verdicts: list[Verdict] = run_ranks(_prove, column.world, families, column)[0]
    except AssertionError as error:
        if len(families) > 1:
            return [verdict for family in families for verdict in _verdicts([family], column)]
        return [Verdict(str(families[0]), column.world, "failed", last_line(str(error)))]
    return verdicts


class Prover:
    """Runs the proofs whose verdicts are not cached."""

    def __init__(self, results: Results) -> None:
        self._results = results
        self.new = 0
        """Number of verdicts of this run."""

    def row(self, family: Family, columns: Sequence[Column], *, shapes: bool, training: bool) -> Row:
        """Prove all cells of a family.

        Args:
            family: Its row in the table.
            columns: Columns of the generic shape.
            shapes: Whether to prove the other shapes as well.
            training: Whether to train it with the command.
        """
        row = Row(family)
        likeness = self._cell((str(family), GENERIC, LIKENESS), lambda: prove_likeness(family))
        for column in columns:
            if likeness.outcome in SOUND:
                (row.generic[column],) = self._cells(family, [Variation(family, GENERIC, ())], column)
            else:
                row.generic[column] = replace(likeness, ranks=column.world)
        if training and family.task == "causal_lm":
            row.training = self._training(row)
            row.causality = self._causality(row)
        if shapes and any(verdict.outcome in SOUND for verdict in row.generic.values()):
            self._shapes(row, columns)
        return row

    def _shapes(self, row: Row, columns: Sequence[Column]) -> None:
        family, varied = row.family, self._results.variations(row.family)
        best = next((c for c in columns if row.generic[c].outcome in SOUND), columns[0])
        exemplary = family.model_type in EXEMPLARY and family.task == "causal_lm" and not family.variant
        for column in (*columns, *MORE_COLUMNS) if exemplary else (best,):
            chosen = varied if exemplary and column in MORE_COLUMNS else varied[1:]
            for variation, verdict in zip(chosen, self._cells(family, chosen, column), strict=True):
                row.shapes[variation.shape, column] = verdict

    def _cells(self, family: Family, varied: list[Variation], column: Column) -> list[Verdict]:
        """Return the verdicts of a family in several shapes, in one column."""
        keys = [(str(family), variation.shape, str(column)) for variation in varied]
        unknown = [n for n, key in enumerate(keys) if self._results.get(key) is None]
        began = time.monotonic()
        reached = _verdicts([varied[n].family for n in unknown], column)
        for n, verdict in zip(unknown, reached, strict=True):
            self._add(keys[n], verdict, (time.monotonic() - began) / len(unknown))
        return [verdict for key in keys if (verdict := self._results.get(key)) is not None]

    def _training(self, row: Row) -> Verdict:
        layouts = _training_layouts(row)
        key = (str(row.family), GENERIC, " ".join((TRAINING, *(str(layout) for layout in layouts))))
        return self._cell(key, lambda: _trained(row.family, layouts))

    def _causality(self, row: Row) -> Verdict:
        key = (str(row.family), GENERIC, CAUSALITY)
        verdict = self._cell(key, lambda: prove_causality(row.family))
        is_refused = row.training is not None and row.training.outcome == "refused" and SEES in row.training.reason
        return replace(verdict, outcome="refused") if is_refused and verdict.outcome == "wrong" else verdict

    def _cell(self, key: Key, reach: Callable[[], Verdict]) -> Verdict:
        known = self._results.get(key)
        if known is not None:
            return known
        began = time.monotonic()
        verdict = reach()
        self._add(key, verdict, time.monotonic() - began)
        return verdict

    def _add(self, key: Key, verdict: Verdict, seconds: float) -> None:
        self._results.add(key, verdict, seconds)
        self.new += 1


def _trained(family: Family, layouts: Sequence[Layout]) -> Verdict:
    try:
        sections = tiny_model(family)
    except Exception as error:  # the families' constructors raise many types
        return Verdict(str(family), 1, "not built", f"{type(error).__name__}: {error}".splitlines()[0])
    return prove_training(str(family), sections, layouts)


def _training_layouts(row: Row) -> list[Layout]:
    """Layouts of the first and the second step: both shard the model, if that is possible."""
    sound = [column for column, verdict in row.generic.items() if verdict.outcome in SOUND and column.world == 2]
    ways = [f"tensor={c.tensor},pipeline={c.pipeline}" for c in sound if not c.sequence_parallel]
    return [parse_layout(way) for way in [*ways, "data=2", "data=1"][:2]]


def prove_all(
    families: list[Family], columns: Sequence[Column], results: Results, *, shapes: bool = False, training: bool = False
) -> Iterator[Row]:
    """Prove the families one by one, with a line each."""
    prover = Prover(results)
    began = time.monotonic()
    width = max(len(str(family)) for family in families)
    waited = 0
    for number, family in enumerate(families, start=1):
        before = prover.new
        try:
            row = prover.row(family, columns, shapes=shapes, training=training)
        except Exception as error:  # an exception of a family outside its ranks must not end the run
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            row = Row(family, {column: Verdict(str(family), column.world, "failed", reason) for column in columns})
        waited += prover.new > before
        spent = time.monotonic() - began
        left = spent / max(1, waited) * (len(families) - number)
        outcomes = " / ".join(v.outcome for v in row.generic.values())
        if row.training is not None:
            outcomes += f"; trained: {row.training.outcome}"
        if row.shapes:
            outcomes += f"; {len(row.shapes)} in other shapes: {totals([v.outcome for v in row.shapes.values()])}"
        print(
            f"[{number:{len(str(len(families)))}}/{len(families)}] {clock(left)} left  {family!s:{width}}  "
            f"{outcomes}{_remark(row)}",
            flush=True,
        )
        yield row


def _remark(row: Row) -> str:
    reasons = {
        f"{v.family}: {reason_of(v)}" if v.outcome in BAD else reason_of(v): None
        for v in row.verdicts
        if v.outcome not in SOUND and v.reason
    }
    worst = max((v.worst for v in row.verdicts), default=0.0)
    if any(v.outcome == "wrong" for v in row.verdicts):
        reasons[f"largest difference {worst:.1e}"] = None
    return "  " + "; ".join(reasons)[:300] if reasons else ""


def reason_of(verdict: Verdict) -> str:
    """Return the reason of a refusal without the key, which is always the same."""
    key, colon, rest = verdict.reason.partition(": ")
    return rest if colon and key.startswith("parallel.") else verdict.reason


def totals(outcomes: Sequence[str]) -> str:
    """Format the number of verdicts by outcome."""
    return ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in OUTCOMES if outcome in outcomes)


def run(names: list[str], columns: Sequence[Column], results: Results, *, shapes: bool, training: bool) -> list[Row]:
    """Prove the families called `names` in `columns`, and print the number of verdicts by outcome."""
    rows = list(prove_all(chosen(names), columns, results, shapes=shapes, training=training))
    for column in columns:
        print(f"{column}: {totals([row.outcome(column) for row in rows])}")
    if trained := [row.training.outcome for row in rows if row.training]:
        print(f"trained by launch/train.py: {totals(trained)}")
    if varied := [verdict.outcome for row in rows for verdict in row.shapes.values()]:
        print(f"{len(varied)} proofs in other shapes: {totals(varied)}")
    return rows


def is_sound(rows: list[Row]) -> bool:
    """Return whether no verdict is a fault."""
    return not any(verdict.outcome in BAD for row in rows for verdict in row.verdicts)
