"""Any layout resumes from a checkpoint of any other layout."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.cases import BF16, BF16_FP32, OFFLOAD, SMALL_GROUPS, RunUnbroken, run_cli, run_config
from tests.checkpoint_jobs import read_state, train_and_save
from tests.commands import read_rows
from tests.harness import run_ranks
from tools.parity.layout import Layout
from trainer.sharding import DimShard, Shard, chunks_of_flat_range, chunks_of_fragment

PAIRS = [
    ("deepseek_v3", Layout(2, tensor=2), Layout(2, zero=1)),  # has a persistent buffer
    ("llama", Layout(2, zero=1), Layout(2, tensor=2)),
    ("llama", Layout(2, zero=1), Layout(2, zero=3, changes=SMALL_GROUPS)),
    ("tied", Layout(2, pipeline=2, zero=1, changes=BF16), Layout(2, zero=2, changes=BF16_FP32)),
]


SLOW_PAIRS = [
    ("llama", Layout(2, zero=3, changes=SMALL_GROUPS), Layout(2, pipeline=2)),
    ("gpt2", Layout(2, tensor=2, zero=1), Layout(2, zero=3)),
    ("tied", Layout(8, tensor=2, pipeline=2, zero=1), Layout()),
    ("mixtral", Layout(4, tensor=2, zero=2), Layout(3, zero=1)),
    ("llama", Layout(), Layout(2, zero=1)),
    ("llama", Layout(), Layout(4, tensor=4)),
    ("llama", Layout(2), Layout(2, zero=3)),
    ("llama", Layout(2, zero=1), Layout(2, zero=3, changes=OFFLOAD)),
    ("llama", Layout(2, zero=1), Layout(4, zero=2)),
    ("llama", Layout(2, zero=1), Layout(4, tensor=2, pipeline=2)),
    ("llama", Layout(2, zero=2), Layout(2, zero=1, changes=OFFLOAD)),
    ("llama", Layout(2, zero=3), Layout(1)),
    ("llama", Layout(2, zero=3), Layout(2, zero=2)),
    ("llama", Layout(2, zero=3), Layout(4, tensor=2, zero=3)),
    ("llama", Layout(4, tensor=2, zero=1), Layout(2, zero=1)),
    ("llama", Layout(4, tensor=2, zero=1), Layout(2, tensor=2, zero=3)),
    ("llama", Layout(2, tensor=2), Layout(4, tensor=4, sequence_parallel=True)),
    ("llama", Layout(2, tensor=2, sequence_parallel=True), Layout(2, pipeline=2)),
    ("llama", Layout(4, tensor=4), Layout(2, zero=1)),
    ("llama", Layout(2, pipeline=2), Layout(1)),
    ("llama", Layout(2, pipeline=2), Layout(2, pipeline=2, dualpipev=True)),
    ("llama", Layout(4, pipeline=2, zero=1), Layout(4, tensor=2, zero=2)),
    ("llama", Layout(8, tensor=2, pipeline=2, zero=1), Layout(4, tensor=2, pipeline=2)),
    ("tied", Layout(2, pipeline=2, dualpipev=True), Layout(2, tensor=2)),
    ("tied", Layout(1), Layout(8, tensor=2, pipeline=2, zero=1)),
    ("tied", Layout(2, zero=3), Layout(2, pipeline=2, zero=1)),
    ("gpt2", Layout(2, pipeline=2), Layout(4, tensor=2, zero=1)),
    ("gpt2", Layout(4, tensor=4), Layout(1)),
    ("mixtral", Layout(2, tensor=2), Layout(2, pipeline=2)),
    ("mixtral", Layout(2, pipeline=2, zero=1), Layout(4, tensor=4)),
]


@pytest.mark.parametrize(
    ("model", "source", "target"),
    [*PAIRS, *(pytest.param(*row, marks=pytest.mark.matrix) for row in SLOW_PAIRS)],
    ids=str,
)
def test_checkpoint_resumes_in_another_layout(
    model: str,
    source: Layout,
    target: Layout,
    base: dict[str, Any],
    unbroken_run: RunUnbroken,
    tmp_path: Path,
) -> None:
    """Saved, loaded in another layout and saved again, the state is equal bit for bit, and training continues."""
    unbroken = unbroken_run(model, source)
    config = run_config(base, model, target, tmp_path, checkpoint__resume=str(unbroken.checkpoint(3)))
    losses = run_ranks(train_and_save, target.world_size, config, 6, (3,))[0]
    state, expected = read_state(tmp_path / "checkpoints" / "step-00000003"), read_state(unbroken.checkpoint(3))
    assert state.keys() == expected.keys()
    assert any(key.startswith("buffer/") for key in expected) == (model == "deepseek_v3")
    assert [key for key in expected if not state[key].equal(expected[key])] == []
    # Layouts sum in different orders; in bf16 the gradients are also summed in another dtype.
    tolerance = 1e-3 if source.changes[:1] == BF16 else 1e-5
    expected_losses = {step: unbroken.losses[step] for step in (4, 5, 6)}
    assert losses == pytest.approx(expected_losses, rel=tolerance)


CURVES = [
    ("llama", Layout(2, zero=1), Layout(2, tensor=2)),
    ("tied", Layout(4, tensor=2, pipeline=2), Layout(1)),
]


SLOW_CURVES = [
    ("llama", Layout(2, zero=3), Layout(2, pipeline=2)),
    ("llama", Layout(1), Layout(8, tensor=2, pipeline=2, zero=1)),
    ("tied", Layout(2, pipeline=2), Layout(2, zero=2)),
    ("gpt2", Layout(2, tensor=2), Layout(2, zero=1)),
    ("mixtral", Layout(2, zero=2), Layout(2, tensor=2)),
    ("mixtral", Layout(2, tensor=2, zero=1), Layout(4, tensor=2, pipeline=2)),
]


@pytest.mark.parametrize(
    ("model", "source", "target"),
    [*CURVES, *(pytest.param(*row, marks=pytest.mark.matrix) for row in SLOW_CURVES)],
    ids=str,
)
def test_command_resumes_in_another_layout(
    model: str, source: Layout, target: Layout, base: dict[str, Any], tmp_path: Path
) -> None:
    """A run of six steps, and one that resumes from its third step in another layout, have equal metrics."""
    values = {"training__log_every_steps": 1, "checkpoint__every_steps": 3, "checkpoint__asynchronous": True}
    config = run_config(base, model, source, tmp_path / "unbroken" / "run", **values)
    unbroken = run_cli(config, tmp_path / "unbroken", world=source.world_size)
    assert unbroken.status == 0, unbroken.err
    third = str(tmp_path / "unbroken" / "run" / "checkpoints" / "step-00000003")
    config = run_config(base, model, target, tmp_path / "resumed" / "run", **values)
    resumed = run_cli(config, tmp_path / "resumed", "--resume", third, world=target.world_size)
    assert resumed.status == 0, resumed.err
    assert "resuming from step 3" in resumed.out
    expected_rows, rows = (
        {row["step"]: row for row in read_rows(tmp_path / name / "run")} for name in ("unbroken", "resumed")
    )
    assert list(rows) == [4, 5, 6]
    for key in ("loss", "grad_norm", "learning_rate", "epoch", "tokens", "samples", "auxiliary_loss"):
        expected = [expected_rows[step][key] for step in (4, 5, 6) if key in expected_rows[step]]
        assert [rows[step][key] for step in (4, 5, 6) if key in rows[step]] == pytest.approx(expected, rel=1e-4), key
    assert (tmp_path / "resumed" / "run" / "final" / "config.json").exists()


def test_chunks_cover_sharded_tensor() -> None:
    """Any stretch of any part of a weight, fused or not, padded or not, is where its boxes say."""
    draw = random.Random(0)
    for _ in range(300):
        shape = tuple(draw.randint(1, 7) for _ in range(draw.randint(1, 3)))
        dim, of = draw.randrange(len(shape)), draw.randint(1, 3)
        borders = sorted(draw.sample(range(1, shape[dim]), min(shape[dim] - 1, draw.randint(0, 2))))
        packed = tuple(b - a for a, b in itertools.pairwise([0, *borders, shape[dim]]))
        whole, found = torch.arange(1, 1 + math.prod(shape)).view(shape), torch.zeros(shape, dtype=torch.int64)
        for index in range(of):
            shard = Shard("x", shape, (DimShard(dim, index, of, packed),))
            flat = shard.extract(whole).reshape(-1)
            middle = draw.randint(0, flat.numel())
            for first, end in ((0, middle), (middle, flat.numel())):
                chunks = list(chunks_of_fragment(flat[first:end], first, shard))
                assert len(list(chunks_of_flat_range(shard.local_shape(), first, end))) <= max(1, 2 * len(shape) - 1)
                for start, view in chunks:
                    place = tuple(slice(a, a + n) for a, n in zip(start, view.shape, strict=True))
                    assert view.equal(whole[place])
                    found[place] += view
        assert found.equal(whole), "each element once"
