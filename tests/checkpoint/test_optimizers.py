"""The state of every optimizer resumes bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.cases import run_in_one_world
from tests.checkpoint_jobs import read_state, scalar_state_in
from tests.configs import with_values

Case = tuple[str, dict[str, Any], int]
"""Type and parameters of an optimizer, ZeRO stage."""

MUON = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.0, "adam_lr": 0.002}

CASES: list[Case] = [
    ("AdamW", {"lr": 0.002}, 1),  # DeepSpeed's, whose step count Python does not see
    ("SGD", {"lr": 0.05, "momentum": 0.9}, 1),
    ("NAdam", {"lr": 0.002}, 2),  # has a scalar tensor in addition to the step
    ("Adagrad", {"lr": 0.005}, 1),  # creates its state in the constructor
]

SLOW_CASES: list[Case] = [
    *(
        (optimizer, params, stage)
        for optimizer, params in (
            ("AdamW", {"lr": 0.002, "torch_adam": True}),
            ("AdamW", {"lr": 0.002, "torch_adam": True, "amsgrad": True}),
            ("RMSprop", {"lr": 0.0005}),
            ("RAdam", {"lr": 0.002}),
            ("Adamax", {"lr": 0.002}),
            ("Adadelta", {"lr": 0.05}),
            ("ASGD", {"lr": 0.01}),
        )
        for stage in (0, 2)
    ),
    ("SGD", {"lr": 0.05, "momentum": 0.9}, 0),
    ("Adagrad", {"lr": 0.005}, 0),
    ("NAdam", {"lr": 0.002}, 3),
    ("Adafactor", {"lr": 0.002}, 0),  # state of rows and columns, not in the shape of the weights
    ("Rprop", {"lr": 1e-5}, 0),
    ("Lion", {"lr": 1e-4, "betas": [0.9, 0.99]}, 2),
    *(("Muon", MUON, stage) for stage in (0, 1, 2, 3)),
]


def case_name(case: Case) -> str:
    optimizer, params, stage = case
    return f"{optimizer}{'-amsgrad' if 'amsgrad' in params else ''}-zero{stage}"


def case_config(base: dict[str, Any], case: Case) -> dict[str, Any]:
    optimizer, params, stage = case
    zero: dict[str, Any] = {"stage": stage}
    if optimizer == "Lion":
        zero["offload_optimizer"] = {"device": "cpu"}
    if optimizer == "Muon":
        zero["reduce_scatter"] = stage < 3
    section = {"type": optimizer, "params": params}
    return with_values(base, deepspeed__optimizer=section, deepspeed__zero_optimization=zero)


def run_cases(base: dict[str, Any], folder: Path, cases: Sequence[Case]) -> list[tuple[Any, Any]]:
    """Losses of four steps, in `NAME`, and of a run that resumes after the second, in `NAME-resumed`, for each case."""
    jobs: list[tuple[Any, ...]] = []
    for case in cases:
        config, run = case_config(base, case), folder / case_name(case)
        jobs.append((with_values(config, run__output_dir=str(run)), 4, (2, 4)))
        resume = {"run__output_dir": f"{run}-resumed", "checkpoint__resume": str(run / "checkpoints" / "step-00000002")}
        jobs.append((with_values(config, **resume), 4, (2, 4)))
    outcomes = run_in_one_world(jobs, world=2)
    return list(zip(outcomes[::2], outcomes[1::2], strict=True))


def assert_equal_runs(folder: Path, case: Case, losses: Any, resumed_losses: Any) -> None:
    assert list(losses) == [1, 2, 3, 4], losses
    assert resumed_losses == {3: losses[3], 4: losses[4]}
    for step in (2, 4):
        checkpoint = folder / case_name(case) / "checkpoints" / f"step-{step:08}"
        resumed = folder / f"{case_name(case)}-resumed" / "checkpoints" / f"step-{step:08}"
        state, expected = read_state(resumed), read_state(checkpoint)
        assert state.keys() == expected.keys()
        assert [key for key in expected if not key.startswith("weight/")], "the optimizer has state"
        assert [key for key in expected if not state[key].equal(expected[key])] == []
        assert scalar_state_in(resumed) == scalar_state_in(checkpoint)


@pytest.fixture(scope="module")
def outcomes(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[Any, Any]]]:
    """Run `CASES` in one world."""
    folder = tmp_path_factory.mktemp("optimizers")
    return folder, dict(zip(map(case_name, CASES), run_cases(base, folder, CASES), strict=True))


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_optimizer_state_resumes(case: Case, outcomes: tuple[Path, dict[str, tuple[Any, Any]]]) -> None:
    folder, losses = outcomes
    assert_equal_runs(folder, case, *losses[case_name(case)])


@pytest.mark.matrix
@pytest.mark.parametrize("case", SLOW_CASES, ids=case_name)
def test_more_optimizer_state_resumes(case: Case, base: dict[str, Any], tmp_path: Path) -> None:
    assert_equal_runs(tmp_path, case, *run_cases(base, tmp_path, [case])[0])
