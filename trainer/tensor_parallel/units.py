"""Of which parts a weight consists, and which share of each is a rank's: the argument of a style that cuts."""

from __future__ import annotations

import re
from dataclasses import dataclass

from trainer.tensor_parallel.styles import Style


class Refused(Exception):
    """Why one row cannot be applied."""


@dataclass(frozen=True)
class Share:
    """Which of the equal shares of a part a rank holds; the fields have the meaning that they have in `Shard`."""

    index: int
    of: int
    owner: bool = True
    copies: int = 1


@dataclass(frozen=True)
class Part:
    """One of the matrices of a packed weight."""

    size: int
    units: int
    shared: bool

    def place(self, ranks: int, rank: int) -> Share:
        """This rank's share.

        Raises:
            Refused: if the units can neither be divided among the ranks nor shared by equally many of them.
        """
        if self.units % ranks == 0:
            return Share(rank, ranks)
        if self.shared and ranks % self.units == 0:
            copies = ranks // self.units
            return Share(rank // copies, self.units, owner=rank % copies == 0, copies=copies)
        raise Refused(f"its {self.units} units of {self.size // self.units} cannot be divided by tensor {ranks}")


class Scope:
    """Where the names in a style's argument are looked up: the module, those above it, the model's configuration."""

    def __init__(self, *places: object) -> None:
        self._places = places

    def number(self, expression: str) -> int:
        """Value of sums and products of numbers and names, as in `n_groups*state_size`."""
        return sum(self._product(term) for term in expression.split("+"))

    def _product(self, term: str) -> int:
        value = 1
        for factor in term.split("*"):
            over, *under = (self._factor(name.strip()) for name in factor.split("//"))
            value *= over // under[0] if under else over
        return value

    def _factor(self, text: str) -> int:
        return int(text) if text.isdigit() else self._named(text)

    def _named(self, name: str) -> int:
        for place in self._places:
            found = getattr(place, name, None)
            if isinstance(found, int) and not isinstance(found, bool):
                return found
        raise Refused(f"'{name}' is not a number of the module, of one above it, or of the configuration")


def in_units(text: str) -> tuple[str, str]:
    """`size/unit` as (size, unit); the unit is empty where none is given. `//` divides, and separates nothing."""
    size, *unit = re.split(r"(?<!/)/(?!/)", text, maxsplit=1)
    return size, unit[0] if unit else ""


def parse_parts(style: Style, text: str, length: int, scope: Scope) -> tuple[Part, ...]:
    """Reads `3[/unit]`, `each size`, or `size[/unit],size[/unit],...`; `~` before a part lets ranks share its units."""
    equal, unit_text = in_units(text)
    if not text or (equal.isdigit() and "," not in text):
        count = int(equal or (2 if style.word.startswith("packed") else 1))
        unit = scope.number(unit_text) if unit_text else 1
        if length % (count * unit):
            raise Refused(f"{length} is not {count} equal parts" + (f" in units of {unit}" if unit > 1 else ""))
        return tuple(Part(length // count, length // count // unit, shared=False) for _ in range(count))
    if text.startswith("each "):
        size = scope.number(text.removeprefix("each "))
        if length % size:
            raise Refused(f"{length} is not a multiple of {text.removeprefix('each ')} = {size}")
        return tuple(Part(size, size, shared=False) for _ in range(length // size))
    parts = []
    for item in text.split(","):
        size_text, unit_text = in_units(item.strip().removeprefix("~"))
        size = length if size_text == "all" else scope.number(size_text)
        unit = scope.number(unit_text) if unit_text else 1
        if size % unit:
            raise Refused(f"{size} is not a multiple of the unit {unit_text} = {unit}")
        parts.append(Part(size, size // unit, item.strip().startswith("~")))
    if sum(part.size for part in parts) != length:
        raise Refused(f"its parts {text} = {[p.size for p in parts]} do not sum up to {length}")
    return tuple(parts)
