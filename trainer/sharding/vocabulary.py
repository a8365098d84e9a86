"""The columns of a model's logits that this rank holds."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.distributed.collectives import Group


@dataclass(frozen=True)
class VocabularyShard:
    """The columns [rank x width, (rank + 1) x width) of a vocabulary; by default all of it, on one rank."""

    size: int | None = None
    """Columns of the full head; None where this rank has all of them."""

    width: int | None = None
    """Columns that this rank has, padding included; None for any number."""

    group: Group = None
    rank: int = 0
    ranks: int = 1
