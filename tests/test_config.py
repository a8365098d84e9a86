"""Checking and resolving configurations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.configs import with_values
from tests.harness import run_command
from tools.configuration_page import configuration_page
from tools.schema import schema_text
from trainer.config import rules
from trainer.config.deepspeed import (
    RESOLVED_AUTOS,
    UNSUPPORTED,
    Batch,
    DeepSpeedSection,
    batch_arithmetic,
    deepspeed_clips_gradients,
    engine_settings,
    required_extensions,
)
from trainer.config.load import check_config, load_config
from trainer.data.inspection import DataReport
from trainer.errors import ConfigError

pytestmark = pytest.mark.fast
ROOT = Path(__file__).parent.parent
TRAIN = str(ROOT / "launch" / "train.py")
GENERATED = {"ds_configs/schema.json": schema_text, "docs/configuration.md": configuration_page}
"""Writer of each file that is generated from the schema."""


def problems(config: dict[str, Any], world: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_config(config, world_size=world, device="cpu")
    return [str(problem) for problem in caught.value.problems]


def test_all_problems_are_reported_in_one_pass(tiny: dict[str, Any]) -> None:
    config = with_values(
        tiny,
        parallel__tensr=1,
        training__max_steps=True,
        deepspeed__train_micro_batch_size_per_gpu=3,
        deepspeed__optimizer__type="AdmW",
        model__config__hidden_sise=3,
        data__train=[{"path": "./nowhere.txt"}],
        trakcing={},
    )
    found = problems(config)
    for start in (
        "trakcing:",
        "parallel.tensr:",
        "training.max_steps:",
        "deepspeed.train_batch_size:",
        "deepspeed.optimizer.type:",
        "model.config.hidden_sise:",
        "data.train.0.path:",
    ):
        assert sum(line.startswith(start) for line in found) == 1, (start, found)
    assert len(found) == 7


def test_invalid_value_skips_dependent_rules(tiny: dict[str, Any]) -> None:
    assert problems(with_values(tiny, deepspeed__train_batch_size="many")) == [
        "deepspeed.train_batch_size: expected whole number or 'auto', got \"many\""
    ]


def section(**keys: object) -> DeepSpeedSection:
    return DeepSpeedSection.model_validate_json(json.dumps(keys))


@pytest.mark.parametrize(
    ("train", "micro", "steps", "ranks", "expected"),
    [
        (64, 2, "auto", 4, Batch(64, 2, 8)),
        (64, None, 8, 4, Batch(64, 2, 8)),
        ("auto", 2, 8, 4, Batch(64, 2, 8)),
        (64, 2, 8, 4, Batch(64, 2, 8)),
        (65, 2, None, 4, None),
        (64, 2, 4, 4, None),
        (64, None, None, 4, None),
        (None, None, 8, 1, None),
    ],
)
def test_batch_arithmetic_derives_third_key(
    train: object, micro: object, steps: object, ranks: int, expected: Batch | None
) -> None:
    given = {"train_batch_size": train, "train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": steps}
    found = batch_arithmetic(section(**{k: v for k, v in given.items() if v is not None}), ranks)
    assert (found if isinstance(found, Batch) else None) == expected


def test_every_auto_is_resolved(tiny: dict[str, Any]) -> None:
    config = with_values(
        tiny,
        deepspeed__gradient_accumulation_steps="auto",
        deepspeed__gradient_clipping="auto",
        deepspeed__optimizer__params={"lr": 0.003, "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        deepspeed__scheduler={
            "type": "WarmupDecayLR",
            "params": {"warmup_num_steps": 2}
            | dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "total_num_steps"), "auto"),
        },
        deepspeed__zero_optimization={
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
    )
    resolved = check_config(config, world_size=2, device="cpu").deepspeed_json
    assert '"auto"' not in json.dumps(resolved)
    assert resolved["gradient_accumulation_steps"] == 2
    assert resolved["gradient_clipping"] == 1.0
    assert resolved["optimizer"]["params"] == {"lr": 0.003, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    assert resolved["scheduler"]["params"] == {
        "warmup_min_lr": 0.0,
        "warmup_max_lr": 0.003,
        "total_num_steps": 4,
        "warmup_num_steps": 2,
    }
    zero = resolved["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["stage3_prefetch_bucket_size"]) == (32 * 32, int(0.9 * 32 * 32))
    assert zero["stage3_param_persistence_threshold"] == 320


def _keys_without_auto() -> list[str]:
    """Return keys of several sections whose value cannot be "auto"."""
    return [
        "zero_optimization.stage",
        "zero_optimization.overlap_comm",
        "zero_optimization.sub_group_size",
        "steps_per_print",
        "communication_data_type",
    ]


@pytest.mark.parametrize("path", _keys_without_auto())
def test_unresolvable_auto_is_refused(path: str, tiny: dict[str, Any]) -> None:
    assert path not in RESOLVED_AUTOS
    found = problems(with_values(tiny, **{f"deepspeed__{path.replace('.', '__')}": "auto"}))
    assert [line for line in found if line.startswith(f'deepspeed.{path}: "auto" cannot be resolved')]


def test_unsupported_deepspeed_key_has_reason(tiny: dict[str, Any]) -> None:
    for key, (reason, _) in UNSUPPORTED.items():
        values = {f"deepspeed__{key.replace('.', '__')}": {}}
        if key.startswith("zero_optimization."):
            values["deepspeed__zero_optimization__stage"] = 1
        found = problems(with_values(tiny, **values))
        assert any(line.startswith(f"deepspeed.{key}: {reason}") for line in found), (key, found)


def test_engine_clips_only_at_zero_0_in_fp32(tiny: dict[str, Any]) -> None:
    for stage, bf16, theirs in ((0, False, False), (0, True, True), (1, False, True), (3, False, True)):
        config = with_values(tiny, deepspeed__zero_optimization={"stage": stage}, deepspeed__bf16={"enabled": bf16})
        resolved = check_config(config, world_size=1, device="cpu").deepspeed_json
        assert deepspeed_clips_gradients(resolved) is theirs
        assert engine_settings(resolved)["gradient_clipping"] == (0.5 if theirs else 0.0)


def test_resolved_configuration_is_valid_input(tiny: dict[str, Any]) -> None:
    resolved = check_config(tiny, world_size=2, device="cpu").resolved()
    assert check_config(resolved, world_size=2, device="cpu").resolved() == resolved


def test_print_config_prints_resolved_configuration(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    ended = run_command(TRAIN, "--config", str(tmp_path / "config.json"), "--print_config", "--set", "run.seed=5")
    assert ended.status == 0, ended.err
    printed = json.loads(ended.out)
    assert printed["run"]["seed"] == 5
    assert printed["tessera"]["document_frame"]["suffix_tokens"] == ["<|endoftext|>"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (
            [],
            [
                "processes    1 = pipeline 1 x data 1 x tensor 1",
                "8 samples a step = 2 a micro-batch x 4 accumulated x 1",
            ],
        ),
        (["--world", "4"], ["processes    4 = pipeline 1 x data 4 x tensor 1", "2 a micro-batch x 1 accumulated x 4"]),
        (["--set", "deepspeed.gradient_accumulation_steps=2"], ["processes    2 =", "x 2 data ranks"]),
    ],
)
def test_dry_run_describes_run(extra: list[str], expected: list[str], tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    ended = run_command(TRAIN, "--config", str(tmp_path / "config.json"), "--dry_run", *extra)
    assert ended.status == 0, ended.err
    for words in (
        *expected,
        "parameters   39,072;",
        "tokens       at most 256 a step",
        "documents    TEXT <|endoftext|> (0)",
        "of model states",
    ):
        assert words in ended.out
    assert not (tmp_path / "run").exists()


def test_dry_run_refuses_indivisible_world_size(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    ended = run_command(TRAIN, "--config", str(tmp_path / "config.json"), "--dry_run", "--world", "3")
    assert ended.status == 2
    assert "must be a multiple of" in ended.err


@pytest.mark.parametrize("name", GENERATED)
def test_generated_file_is_current(name: str) -> None:
    assert (ROOT / name).read_text() == GENERATED[name](), "run `python -m tools.schema`"


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.name)
def test_shipped_configuration_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.name == "schema.json":
        return
    if path.name != "quickstart.json":  # all read the same text, which takes seconds
        monkeypatch.setattr("trainer.dry_run.inspect_data", lambda loaded: DataReport((), 1000, True))
    loaded = load_config(path)
    from trainer.dry_run import describe

    said = describe(loaded)
    assert "the configuration is valid" in said
    assert "checkpoint   " in said


def test_invalid_configuration_is_refused_within_five_cpu_seconds(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(with_values(tiny, parallel__tensr=2)))
    measured = (
        "import resource, subprocess, sys\n"
        f"ended = subprocess.run([sys.executable, {TRAIN!r}, '--config', {str(tmp_path / 'config.json')!r}])\n"
        "use = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(ended.returncode, use.ru_utime + use.ru_stime)\n"
    )
    most = 0.0
    for _ in range(3):  # a machine that is busy with something else takes longer for the same work
        status, seconds = subprocess.run(
            [sys.executable, "-c", measured], capture_output=True, text=True, check=True
        ).stdout.split()
        assert int(status) == 2
        if (most := float(seconds)) < 5:
            break
    assert most < 5


@pytest.mark.parametrize("there", [True, False])
def test_nvme_offload_requires_async_io(
    there: bool, tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules.offload, "is_async_io_available", lambda: there)
    offload = {"device": "nvme", "nvme_path": str(tmp_path)}
    values = with_values(tiny, deepspeed__zero_optimization={"stage": 3, "offload_optimizer": offload})
    if there:
        values["checkpoint"] = {"asynchronous": True}
        loaded = check_config(values, world_size=1, device="cpu")
        assert [problem.path for problem in loaded.warnings] == ["checkpoint.asynchronous"]
        assert required_extensions(loaded.deepspeed_json) == ["CPUAdamBuilder", "AsyncIOBuilder"]
    else:
        with pytest.raises(ConfigError, match=r"async_io, which cannot be compiled here.*Install libaio-dev"):
            check_config(values, world_size=1, device="cpu")
