"""Errors of any rank are raised on all ranks."""

from __future__ import annotations

import pytest

from tests.harness import run_ranks
from trainer import exit
from trainer.distributed import (
    Launch,
    agree,
    joined_world,
)
from trainer.errors import CheckpointError, ConfigError, Problem
from trainer.topology import Topology


@pytest.mark.fast
@pytest.mark.parametrize(("world", "waits"), [(2, True), (1, False)])
def test_exit_on_errors_waits_for_the_rank_that_failed_first(
    world: int, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collective that fails because another rank exited must not set the status of the run."""
    waited: list[float] = []
    monkeypatch.setattr(exit.time, "sleep", waited.append)
    launch = Launch(rank=world - 1, world_size=world)
    with pytest.raises(RuntimeError, match="Connection closed"), exit.exit_on_errors(launch):
        raise RuntimeError("Connection closed by peer")
    assert (sum(waited) >= 5) == waits


def _errors_of_agreement() -> list[str]:
    """Return the errors of this rank if both ranks have a problem, only the last one has, and none has."""
    launch = Launch.from_environment()

    def config(rank: int) -> int:
        if launch.rank in (rank, 2):
            raise ConfigError(Problem("model.path", f"rank {launch.rank} misses a file"))
        return launch.rank

    def checkpoint() -> int:
        if launch.rank == 2:
            raise CheckpointError("damaged")
        return launch.rank

    told = []
    with joined_world(launch, Topology.of(launch.world_size, launch.rank), seed=1):
        for work in (lambda: config(1), checkpoint):
            with pytest.raises((ConfigError, CheckpointError)) as raised:
                agree(work)
            told.append(str(raised.value))
        told.append(str(agree(lambda: launch.rank)))
    return told


def test_agree_raises_the_errors_of_any_rank_on_all_ranks() -> None:
    for rank, (problems, damage, result) in enumerate(run_ranks(_errors_of_agreement, 3)):
        assert "rank 1 misses a file" in problems
        assert "rank 2 misses a file" in problems
        assert (damage, result) == ("damaged", str(rank))
