"""Which validation samples an evaluation reads."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.configs import LENGTH, with_values
from tests.data_helpers import batch_shape, checked_samples, prepared, write_tokens
from trainer.config.load import check_config
from trainer.data import open_batches
from trainer.data.batches import EvaluationBatches, allocate_evaluation_samples
from trainer.data.samples import CheckedSamples
from trainer.tasks import IGNORE_INDEX
from trainer.tasks.samples import DocumentSamples
from trainer.topology import Topology

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("limit", [None, 1, 2])
def test_evaluation_reads_each_sample_once(ranks: int, limit: int | None, tmp_path: Path) -> None:
    samples = checked_samples(tmp_path, [[n, n + 1, 99] for n in range(11)])
    per_rank = [
        list(EvaluationBatches([samples], batch_shape(data_rank=r, data_ranks=ranks), limit)) for r in range(ranks)
    ]
    assert len({len(batches) for batches in per_rank}) == 1, "ranks must take equally many steps"
    seen = [row[0] for batches in per_rank for m in batches for row in m.labels.tolist() if row[0] != IGNORE_INDEX]
    assert sorted(seen) == list(range(1, 1 + min(11, (limit or 99) * 4)))


@pytest.mark.parametrize(
    ("samples", "limit", "shares"),
    [
        ((100, 100), 10, [20, 20]),
        ((300, 100), 10, [30, 10]),
        ((1000, 1), 10, [39, 1]),
        ((1000, 10, 10), 10, [32, 4, 4]),
        ((90, 70, 10, 3), 10, [19, 14, 4, 3]),
        ((100, 100, 100), 1, [4, 4, 4]),
        ((100, 2), 1, [4, 2]),
        ((7, 5), 3, [7, 5]),
        ((7, 5), None, [7, 5]),
        ((50,), 3, [12]),
    ],
)
def test_evaluation_samples_are_allocated_proportionally(
    samples: tuple[int, ...], limit: int | None, shares: list[int]
) -> None:
    """In batches of 4 samples, with at least one batch of each source or all of its samples."""
    assert allocate_evaluation_samples(samples, 4, limit) == shares


def test_evaluation_allocation_invariants() -> None:
    draw = random.Random(3)
    for _ in range(300):
        samples = [draw.randint(1, 200) for _ in range(draw.randint(1, 6))]
        batch, limit = draw.randint(1, 16), draw.randint(1, 40)
        shares = allocate_evaluation_samples(samples, batch, limit)
        minimum = [min(count, batch) for count in samples]
        assert all(low <= share <= count for low, share, count in zip(minimum, shares, samples, strict=True))
        assert sum(shares) == min(sum(samples), max(limit * batch, sum(shares) if shares == minimum else 0))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_limited_evaluation_covers_every_source(ranks: int, tmp_path: Path) -> None:
    """Each selected sample is read once, and the selection does not depend on the number of ranks."""
    sources = []
    for number, count in enumerate((20, 6, 3)):
        tokens = write_tokens(tmp_path / str(number), [[1, 30 * number + n, 99] for n in range(count)])
        sources.append(CheckedSamples(DocumentSamples(tokens, 4), tokens, 100))
    per_rank = [list(EvaluationBatches(sources, batch_shape(data_rank=r, data_ranks=ranks), 4)) for r in range(ranks)]
    assert len({len(batches) for batches in per_rank}) == 1
    seen = [row[0] for batches in per_rank for m in batches for row in m.labels.tolist() if row[0] != IGNORE_INDEX]
    assert sorted(seen) == [*range(9), *range(30, 34), *range(60, 63)]


def test_evaluation_counts_source_not_files(tiny: dict[str, Any], tmp_path: Path) -> None:
    """The files of a glob share the allocation of their source: one batch per source, not per file."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for number in range(3):
            write_tokens(tmp_path / folder / str(number), [[1 + (ord(folder) + number) % 7] * (5 * LENGTH + 1)])
    paths = [{"path": str(tmp_path / folder / "*.bin")} for folder in ("a", "b")]
    config = with_values(tiny, data__validation=paths, evaluation={"max_batches": 2})
    loaded = check_config(config, world_size=1, device="cpu")
    validation = open_batches(loaded, prepared(config), Topology.of(1, 0)).validation
    assert validation is not None
    rows = [row[0] for micro in validation for row in micro.labels.tolist()]
    assert rows == [1 + (ord(folder) + n) % 7 for folder in ("a", "b") for n in (0, 0, 0, 0, 0, 1, 1, 1)]
