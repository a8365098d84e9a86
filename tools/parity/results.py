"""Caches verdicts, so that a long run that was stopped resumes.

A verdict holds for the family in its shape, its column, and the sources that were proven: any change of
`trainer/`, of the proof, or of torch, transformers or DeepSpeed invalidates it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tools.parity.families import Family
from tools.parity.gradient_proof import Verdict
from tools.parity.variations import Variation, variations

FOLDER = Path(".cache/parity")
PROVEN = ("trainer", "tools/parity", "launch/train.py", "tools/ranks.py")
"""Sources on which a verdict depends."""

_UNPROVEN = ("tools/parity/page.py", "tools/parity/__main__.py")
_PACKAGES = ("torch", "transformers", "deepspeed")

Key = tuple[str, str, str]
"""(family, shape, column)."""


@functools.cache
def source_hash() -> str:
    """Return a hash of all sources and versions that a verdict depends on."""
    whole = hashlib.sha256(" ".join(f"{name} {version(name)}" for name in _PACKAGES).encode())
    for root in map(Path, PROVEN):
        files = [root] if root.is_file() else sorted(root.rglob("*.py"))
        for file in files:
            if file.as_posix() not in _UNPROVEN:
                whole.update(file.as_posix().encode() + file.read_bytes())
    return whole.hexdigest()[:16]


def _variation(row: dict[str, Any]) -> Variation:
    return Variation(Family(**row["family"]), row["shape"], tuple(row["changed"]))


class Results:
    """Verdicts by key, in a file to which each verdict is appended at once."""

    def __init__(self, folder: Path = FOLDER, *, fresh: bool = False) -> None:
        """Read the verdicts of earlier runs, unless `fresh`."""
        self._path = folder / f"{source_hash()}.jsonl"
        self._known: dict[Key, tuple[Verdict, float]] = {}
        self._variations: dict[str, list[Variation]] = {}
        if not fresh and self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                self._take(line)

    def _take(self, line: str) -> None:
        try:
            row: dict[str, Any] = json.loads(line)
            if "variations" in row:
                self._variations[row["family"]] = [_variation(row_variation) for row_variation in row["variations"]]
                return
            verdict = Verdict(**row["verdict"] | {"loss": tuple(row["verdict"]["loss"])})
        except (ValueError, KeyError, TypeError):  # the last line of a killed run
            return
        self._known[row["family"], row["shape"], row["layout"]] = verdict, row["seconds"]

    def get(self, key: Key) -> Verdict | None:
        known = self._known.get(key)
        return None if known is None else known[0]

    def add(self, key: Key, verdict: Verdict, seconds: float) -> None:
        self._known[key] = verdict, seconds
        family, shape, layout = key
        self._append(
            {"family": family, "shape": shape, "layout": layout, "seconds": seconds, "verdict": asdict(verdict)}
        )

    def variations(self, family: Family) -> list[Variation]:
        """Return the shapes of a family; its tiny model is built and run in each."""
        name = str(family)
        if name not in self._variations:
            self._variations[name] = list(variations(family))
            self._append({"family": name, "variations": [asdict(variation) for variation in self._variations[name]]})
        return self._variations[name]

    def _append(self, row: dict[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def seconds(self) -> float:
        """Return the total time of all known verdicts."""
        return sum(seconds for _, seconds in self._known.values())
