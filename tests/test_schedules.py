"""Learning rates: steps of rate 0 in DeepSpeed's warm-ups, and the WSD schedule in every engine and when resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.configs import with_values
from tests.harness import run_command, run_ranks
from tests.training_jobs import learning_rates
from trainer.config.deepspeed import engine_settings, first_learning_rates
from trainer.config.load import check_config

TRAIN = "launch/train.py"
RATE, LEAST, FIRST = 0.002, 0.0004, 0.0001
WSD = {
    "warmup_num_steps": 3,
    "decay_num_steps": 4,
    "total_num_steps": "auto",
    "warmup_min_lr": FIRST,
    "warmup_max_lr": "auto",
    "decay_min_lr": LEAST,
}


def expected(steps: int, total: int, decay_type: str = "linear") -> list[float]:
    """Rates of a warm-up over 3 steps and a decay over 4, by hand."""
    fall = {
        "linear": [0.75, 0.5, 0.25, 0.0],
        "cosine": [(1 + math.cos(math.pi * quarter / 4)) / 2 for quarter in (1, 2, 3, 4)],
        "1-sqrt": [0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0.0],
    }[decay_type]
    warmup = [FIRST + (RATE - FIRST) * third / 3 for third in (1, 2, 3)]
    decay = [LEAST + (RATE - LEAST) * share for share in fall]
    return [*warmup, *[RATE] * (total - 7), *decay, *[LEAST] * (steps - total)][:steps]


@pytest.fixture(scope="module")
def base(base: dict[str, Any]) -> dict[str, Any]:
    return with_values(
        base,
        data__validation=[],
        training__max_steps=10,
        deepspeed__scheduler={"type": "WSD", "params": WSD},
        deepspeed__optimizer__params__lr=RATE,
    )


@pytest.mark.fast
@pytest.mark.parametrize("decay_type", ["linear", "cosine", "1-sqrt"])
def test_wsd_matches_formula(decay_type: str, base: dict[str, Any]) -> None:
    config = with_values(base, deepspeed__scheduler__params__decay_type=decay_type)
    loaded = check_config(config, world_size=1, device="cpu")
    assert first_learning_rates(loaded.deepspeed_json, 12) == pytest.approx(expected(12, 10, decay_type))
    resolved = loaded.resolved()
    assert check_config(resolved, world_size=1, device="cpu").resolved() == resolved
    assert "scheduler" not in engine_settings(loaded.deepspeed_json)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "highest"),
    [
        ({"warmup_num_steps": None}, [RATE] * 6),
        ({"decay_num_steps": 0}, expected(6, 20)),
        ({"warmup_max_lr": None}, expected(6, 10)),
        ({"decay_num_steps": 7}, expected(3, 10)),
    ],
)
def test_wsd_allows_missing_phases(changes: dict[str, Any], highest: list[float], base: dict[str, Any]) -> None:
    config = with_values(base, **{f"deepspeed__scheduler__params__{key}": value for key, value in changes.items()})
    resolved = check_config(config, world_size=1, device="cpu").deepspeed_json
    assert first_learning_rates(resolved, len(highest)) == pytest.approx(highest)


def test_wsd_matches_in_every_engine(base: dict[str, Any]) -> None:
    """A scale changes the rate that is applied, and not the one that is logged."""
    scaled = with_values(base, training__learning_rate_scales={"model.norm.weight": 0.5})
    jobs = [with_values(scaled, deepspeed__zero_optimization={"stage": stage}) for stage in (0, 3)]
    for measured in run_ranks(learning_rates, 2, [(job, 11) for job in jobs])[0]:
        assert measured == pytest.approx(expected(11, 10))
    pipeline = with_values(base, parallel__pipeline=2)
    for measured in run_ranks(learning_rates, 2, [(pipeline, 11)]):
        assert measured == [pytest.approx(expected(11, 10))]


def test_wsd_resumes_with_more_steps(base: dict[str, Any], tmp_path: Path) -> None:
    """Steps after a checkpoint have the rates of a run that was as long from the start."""
    run = tmp_path / "run"
    config = with_values(base, run__output_dir=str(run), training__log_every_steps=1)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for steps in (10, 14):
        finished = run_command(
            TRAIN, "--config", str(tmp_path / "config.json"), "--set", f"training.max_steps={steps}", world=2
        )
        assert finished.status == 0, finished.err
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    logged = [row["learning_rate"] for row in rows if row["split"] == "train"]
    assert logged == pytest.approx([*expected(10, 10), *expected(14, 14)[10:]])


LONG = {"total_num_steps": 9}
WARMUPS = [
    ({"type": name, "params": {"warmup_num_steps": steps, "warmup_type": warmup_type} | extra}, zero)
    for name, extra in (("WarmupLR", {}), ("WarmupDecayLR", LONG), ("WarmupCosineLR", LONG))
    for warmup_type in ("linear", "log")
    for steps, zero in ((1, [1, 2]), (2, [1, 2]), (5, [1, 2]))
] + [
    ({"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_min_lr": 0.001, "warmup_max_lr": 0.01}}, []),
    ({"type": "WarmupCosineLR", "params": {"warmup_num_steps": 5, "warmup_min_ratio": 0.1, "total_num_steps": 9}}, [1]),
    ({"type": "WSD", "params": {"warmup_num_steps": 2, "decay_num_steps": 2, "total_num_steps": 6}}, [6]),
]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "params", "key"),
    [
        ("LRRangeTest", {"lr_range_test_min_lr": [0.1]}, "lr_range_test_min_lr"),
        ("OneCycleLR", {"max_lr": [0.1], "total_steps": 10}, "max_lr"),
    ],
)
def test_single_rate_list_becomes_scalar(name: str, params: dict[str, Any], key: str, tiny: dict[str, Any]) -> None:
    """A list would need as many rates as a rank has parameter groups."""
    config = with_values(tiny, deepspeed__scheduler={"type": name, "params": params})
    assert check_config(config, world_size=1, device="cpu").deepspeed_json["scheduler"]["params"][key] == 0.1


@pytest.mark.fast
@pytest.mark.parametrize(("scheduler", "zero"), WARMUPS, ids=str)
def test_zero_rate_steps_match_documentation(scheduler: dict[str, Any], zero: list[int], tiny: dict[str, Any]) -> None:
    """The steps are those that the documentation names."""
    resolved = check_config(
        with_values(tiny, deepspeed__scheduler=scheduler), world_size=1, device="cpu"
    ).deepspeed_json
    assert [step for step, rate in enumerate(first_learning_rates(resolved, 6), start=1) if rate == 0] == zero


def test_dry_run_lists_zero_rate_steps(tiny: dict[str, Any], tmp_path: Path) -> None:
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 3}}
    (tmp_path / "config.json").write_text(json.dumps(with_values(tiny, deepspeed__scheduler=scheduler)))
    output = run_command(TRAIN, "--config", str(tmp_path / "config.json"), "--dry_run").out
    assert "schedule     WarmupLR {'warmup_num_steps': 3}\n" in output
    assert "  the rate is 0 in steps 1 and 2, which changes no weight\n" in output
