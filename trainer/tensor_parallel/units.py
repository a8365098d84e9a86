"""Composition of a dimension from matrices and units, and the share that a rank holds.

A fused weight consists of several matrices, its parts. A part is divided in whole units, such as attention heads. Sizes
are expressions: sums and products of numbers and names, as in `n_groups*state_size`, with `//` for whole division.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_FACTOR = r"\s*(?:[A-Za-z_]\w*|\d+)\s*"
_EXPRESSION = re.compile(rf"{_FACTOR}(?:(?:\+|\*|//){_FACTOR})*")

ALL = "all"
"""Size of a part that spans the whole dimension."""


class Refused(Exception):
    """A plan entry that cannot be applied to its weight; the message says why."""


@dataclass(frozen=True)
class Share:
    """The share of a part that a rank holds; the fields have their meaning in `DimShard` and `Shard`."""

    index: int
    count: int
    owner: bool = True
    copies: int = 1


@dataclass(frozen=True)
class ResolvedPart:
    """A part with evaluated sizes: its size along the dimension, and its number of units."""

    size: int
    units: int
    shared: bool

    def share(self, rank: int, ranks: int) -> Share:
        """Return this rank's share.

        Raises:
            Refused: if the units can neither be divided among the ranks nor shared by equally many of them.
        """
        if self.units % ranks == 0:
            return Share(rank, ranks)
        if self.shared and ranks % self.units == 0:
            copies = ranks // self.units
            return Share(rank // copies, self.units, owner=rank % copies == 0, copies=copies)
        raise Refused(f"its {self.units} units of {self.size // self.units} cannot be divided by tensor {ranks}")


def check_expression(text: str) -> str:
    """Return a size's text.

    Raises:
        ValueError: if it is not a sum of products of numbers and names.
    """
    if not _EXPRESSION.fullmatch(text):
        raise ValueError(f"'{text}' is not a sum of products of numbers and names")
    return text


def parse_integer(text: str) -> int:
    """Return the integer of a text.

    Raises:
        ValueError: if it is not one.
    """
    if not re.fullmatch(r"-?\d+", text):
        raise ValueError(f"'{text}' is not an integer")
    return int(text)


class Scope:
    """Values of the names in an expression: of the module, of those above it, and of the model's configuration."""

    def __init__(self, *holders: object) -> None:
        self._holders = holders

    def number(self, expression: str) -> int:
        """Evaluate an expression.

        Raises:
            Refused: if no holder has an integer of one of its names.
        """
        return sum(self._product(term) for term in expression.split("+"))

    def _product(self, term: str) -> int:
        value = 1
        for factor in term.split("*"):
            dividend, *divisors = (self._factor(name.strip()) for name in factor.split("//"))
            value *= dividend // divisors[0] if divisors else dividend
        return value

    def _factor(self, text: str) -> int:
        return int(text) if text.isdigit() else self._named(text)

    def _named(self, name: str) -> int:
        for holder in self._holders:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        raise Refused(f"'{name}' is not a number of the module, of one above it, or of the configuration")


@dataclass(frozen=True)
class Part:
    """One of the matrices of a fused weight."""

    size: str = ALL
    unit: str = ""
    """Size of a unit; empty for 1."""

    shared: bool = False
    """Whether several ranks hold the same unit where there are fewer units than ranks."""

    def __post_init__(self) -> None:
        for text in (self.size, *([self.unit] if self.unit else [])):
            check_expression(text)

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read `[~]size[/unit]`; `~` marks a shared part."""
        size, unit = split_unit(text.strip().removeprefix("~"))
        return cls(size, unit, shared=text.strip().startswith("~"))

    def __str__(self) -> str:
        return f"{'~' if self.shared else ''}{self.size}" + (f"/{self.unit}" if self.unit else "")

    def resolve(self, length: int, scope: Scope) -> ResolvedPart:
        """Evaluate the sizes for a dimension of `length` elements.

        Raises:
            Refused: if the size is not a multiple of the unit.
        """
        size = length if self.size == ALL else scope.number(self.size)
        unit = scope.number(self.unit) if self.unit else 1
        if size % unit:
            raise Refused(f"{size} is not a multiple of the unit {self.unit} = {unit}")
        return ResolvedPart(size, size // unit, self.shared)


def split_unit(text: str) -> tuple[str, str]:
    """Divide `size/unit` into (size, unit); the unit is empty if there is none. `//` divides sizes."""
    size, *unit = re.split(r"(?<!/)/(?!/)", text, maxsplit=1)
    return size, unit[0] if unit else ""


def equal_parts(length: int, count: int, unit: int) -> tuple[ResolvedPart, ...]:
    """Divide a dimension of `length` into `count` equal matrices of whole units.

    Raises:
        Refused: if the length is no multiple of both.
    """
    if length % (count * unit):
        raise Refused(f"{length} is not {count} equal parts" + (f" in units of {unit}" if unit > 1 else ""))
    return (ResolvedPart(length // count, length // count // unit, shared=False),) * count


def repeated_parts(length: int, size: int, text: str) -> tuple[ResolvedPart, ...]:
    """Divide a dimension of `length` into matrices of `size`, whose expression is `text`, in units of 1.

    Raises:
        Refused: if the length is no multiple of the size.
    """
    if length % size:
        raise Refused(f"{length} is not a multiple of {text} = {size}")
    return (ResolvedPart(size, size, shared=False),) * (length // size)


def listed_parts(length: int, parts: tuple[Part, ...], scope: Scope) -> tuple[ResolvedPart, ...]:
    """Divide a dimension of `length` into the matrices that are listed.

    Raises:
        Refused: if they do not sum up to the length.
    """
    resolved = tuple(part.resolve(length, scope) for part in parts)
    if sum(part.size for part in resolved) != length:
        text = ",".join(str(part) for part in parts)
        raise Refused(f"its parts {text} = {[part.size for part in resolved]} do not sum up to {length}")
    return resolved
