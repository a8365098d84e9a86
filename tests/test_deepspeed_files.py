"""DeepSpeed files of other trainers, in `tests/data/deepspeed`: missing values are reported in one problem."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from tests.configs import with_values
from trainer.config.deepspeed import UNSUPPORTED, normalize, normalize_section
from trainer.config.load import LoadedConfig, check_config, load_config
from trainer.errors import ConfigError

pytestmark = pytest.mark.fast
FILES = sorted((Path(__file__).parent / "data" / "deepspeed").glob("*.json"))
BATCH = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2}


def write(folder: Path, tiny: dict[str, Any], deepspeed: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**tiny, "deepspeed": deepspeed}))
    return path


def refusal(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, world_size=1, device="cpu")
    return [str(problem) for problem in caught.value.problems]


def completed(message: str) -> object:
    """Return the section that a message proposes."""
    match = re.search(r'For example "deepspeed": (\{.*\})$', message)
    assert match, message
    return json.loads(match[1])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_missing_values_are_one_problem_with_usable_remedy(file: Path, tiny: dict[str, Any], tmp_path: Path) -> None:
    (message,) = refusal(write(tmp_path, tiny, str(file)))
    assert "train_batch_size" in message
    assert "optimizer" in message
    assert ("warmup_num_steps" in message) is file.stem.startswith("huggingface")
    loaded = load_config(write(tmp_path, tiny, completed(message)), world_size=1, device="cpu")
    assert '"auto"' not in json.dumps(loaded.deepspeed_json)
    assert loaded.batch.batch_size == 32
    assert loaded.config.deepspeed.precision == "bf16"
    assert (
        loaded.deepspeed_json["zero_optimization"]["stage"]
        == json.loads(file.read_text())["zero_optimization"]["stage"]
    )


def test_auto_values_have_hugging_face_meanings(tiny: dict[str, Any], tmp_path: Path) -> None:
    file = next(file for file in FILES if file.stem == "huggingface_zero3")
    over = {**BATCH, "optimizer": {"params": {"lr": 0.002}}, "scheduler": {"params": {"warmup_num_steps": 2}}}
    resolved = load_config(
        write(tmp_path, tiny, {"extends": str(file), **over}), world_size=1, device="cpu"
    ).deepspeed_json
    assert resolved["optimizer"]["params"] == {"lr": 0.002, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    assert resolved["scheduler"]["params"] == {"warmup_min_lr": 0.0, "warmup_max_lr": 0.002, "warmup_num_steps": 2}
    assert resolved["zero_optimization"]["reduce_bucket_size"] == 32 * 32
    assert resolved["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert (resolved["bf16"]["enabled"], resolved["fp16"]["enabled"]) == (True, False)
    assert resolved["gradient_accumulation_steps"] == 4


# --- extends ---------------------------------------------------------------------------------------------------------


def test_section_extends_file(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "base.json").write_text(json.dumps({**tiny["deepspeed"], "gradient_clipping": 0.25}))
    (tmp_path / "below" / "ds.json").write_text(
        json.dumps({"extends": "base.json", "optimizer": {"params": {"lr": 0.1}}})
    )
    path = write(tmp_path, tiny, {"extends": "below/ds.json", "train_batch_size": 16})
    section = load_config(path, world_size=1, device="cpu").deepspeed_json
    assert (section["train_batch_size"], section["gradient_clipping"]) == (16, 0.25)
    assert section["optimizer"] == {"type": "AdamW", "params": {"lr": 0.1, "eps": 1e-3}}
    assert "extends" not in section


def test_override_replaces_file_and_its_keys(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(tiny["deepspeed"]))
    path = write(tmp_path, tiny, {"train_batch_size": 2})
    overrides = [f"deepspeed={tmp_path / 'ds.json'}", "deepspeed.gradient_clipping=0.75"]
    assert load_config(path, overrides, world_size=1, device="cpu").config.deepspeed.clipping == 0.75
    (problem,) = refusal(path, "deepspeed.extends=ds.json")
    assert problem.startswith("--set deepspeed.extends: only a file can extend another one")


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"extends": "nowhere.json"}, "nowhere.json: no such file"),
        ({"extends": 3}, "deepspeed.extends: expected the path of a file, got 3"),
        ({"extends": "circle.json"}, "deepspeed.extends: a file extends itself: circle.json -> circle.json"),
        ("list.json", "list.json: expected a JSON object, got list"),
    ],
)
def test_invalid_extends_is_refused(section: object, expected: str, tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "circle.json").write_text('{"extends": "circle.json"}')
    (tmp_path / "list.json").write_text("[]")
    (problem,) = refusal(write(tmp_path, tiny, section))
    assert expected in problem


# --- values that only the user can give ------------------------------------------------------------------------------


def loaded(tiny: dict[str, Any], device: object = "cpu", **values: object) -> LoadedConfig:
    return check_config(
        with_values(tiny, **{f"deepspeed__{key}": value for key, value in values.items()}), world_size=1, device=device
    )


def asked(tiny: dict[str, Any], **values: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loaded(tiny, **values)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"optimizer": None}, 'deepspeed.optimizer: required, but missing. For example "optimizer": {"type": "AdamW"'),
        (
            {"train_batch_size": "auto"},
            "deepspeed: two of the three batch keys are required; missing: train_batch_size",
        ),
        ({"optimizer__params__lr": "auto"}, 'deepspeed.optimizer.params.lr: "auto" cannot be resolved'),
        ({"zero_optimization": {"stage": "auto"}}, 'deepspeed.zero_optimization.stage: "auto" cannot be resolved'),
        (
            {"zero_optimization": {"stage": "auto"}, "optimizer__params__lr": "auto", "train_batch_size": None},
            "deepspeed: values that nothing else determines are missing: one of train_batch_size, "
            'gradient_accumulation_steps, optimizer.params.lr (got "auto"), zero_optimization.stage (got "auto"). '
            'For example "train_batch_size": 32, "optimizer": {"params": {"lr": 0.0003}}, '
            '"zero_optimization": {"stage": 2} in the deepspeed section',
        ),
    ],
)
def test_missing_values_are_reported_together(values: dict[str, Any], expected: str, tiny: dict[str, Any]) -> None:
    (problem,) = asked(tiny, **values)
    assert problem.startswith(expected)


def test_misspelt_argument_is_not_reported_as_missing(tiny: dict[str, Any]) -> None:
    (problem,) = asked(tiny, optimizer__params__weight_decy="auto")
    assert problem.startswith("deepspeed.optimizer.params.weight_decy: unknown key; did you mean 'weight_decay'?")


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bf16", "fp16", "has_bf16", "expected"),
    [
        ("auto", None, True, "bf16"),
        ("auto", "auto", True, "bf16"),
        (None, "auto", True, "fp32"),
        ("auto", "auto", False, "fp32"),
        (False, "auto", True, "fp32"),
        ("auto", True, True, "fp16"),
    ],
)
def test_auto_precision_follows_device(
    bf16: object, fp16: object, has_bf16: bool, expected: str, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(normalize, "has_bf16", lambda device: has_bf16)
    parts = {name: {"enabled": value} for name, value in (("bf16", bf16), ("fp16", fp16)) if value is not None}
    found = loaded(tiny, device=None, zero_optimization={"stage": 1}, **parts)
    assert found.config.deepspeed.precision == expected
    warned = any(problem.path == "deepspeed.bf16.enabled" for problem in found.warnings)
    assert warned is (bf16 == "auto" and expected == "fp32")


# --- legacy keys -----------------------------------------------------------------------------------------------------

NEUTRAL = {
    "amp": {"enabled": "auto", "opt_level": "auto"},
    "tensorboard": {"enabled": False, "output_path": "x"},
    "wandb": {"enabled": False},
    "csv_monitor": {"enabled": False},
    "elasticity": {"enabled": False, "max_train_batch_size": 2000},
    "curriculum_learning": {"enabled": False},
    "sparse_gradients": False,
    "dataloader_drop_last": False,
    "disable_allgather": False,
    "sequence_parallel_size": 1,
    "zero_force_ds_cpu_optimizer": False,
    "activation_checkpointing": {
        "partition_activations": False,
        "cpu_checkpointing": False,
        "number_checkpoints": None,
    },
    "comms_config": {"verbose": False},
    "monitor_config": {"enabled": True, "tag": "x", "csv_monitor": {"enabled": False}},
}
NEUTRAL_ZERO = {
    "cpu_offload": False,
    "cpu_offload_param": False,
    "cpu_offload_use_pin_memory": False,
    "stage3_gather_fp16_weights_on_model_save": False,
    "elastic_checkpoint": False,
    "legacy_stage1": False,
}


def test_disabled_unsupported_keys_are_ignored(tiny: dict[str, Any]) -> None:
    plain = loaded(tiny, zero_optimization={"stage": 2})
    with_leftovers = loaded(tiny, zero_optimization={"stage": 2, **NEUTRAL_ZERO}, **NEUTRAL)
    assert with_leftovers.resolved() == plain.resolved()


@pytest.mark.parametrize("key", [*NEUTRAL, *(f"zero_optimization.{key}" for key in NEUTRAL_ZERO)])
def test_enabled_unsupported_keys_are_refused(key: str, tiny: dict[str, Any]) -> None:
    on: Any = {
        "sequence_parallel_size": 2,
        "activation_checkpointing": {"partition_activations": True},
        "comms_config": {"verbose": True},
        "monitor_config": {"csv_monitor": {"enabled": True}},
    }.get(key, {"enabled": True} if isinstance(NEUTRAL.get(key), dict) else True)
    (problem,) = asked(tiny, **{"zero_optimization__stage": 2, key.replace(".", "__"): on})
    assert problem.startswith(f"deepspeed.{key}: ")


def test_every_unsupported_switch_may_be_disabled() -> None:
    for key in UNSUPPORTED:
        *parents, name = key.split(".")
        section = {parents[0]: {name: False}} if parents else {name: False}
        assert normalize_section(section, None) == ({parents[0]: {}} if parents else {}), key


def test_zero_key_aliases_are_equivalent(tiny: dict[str, Any]) -> None:
    """Accept `prefetch_bucket_size` for `stage3_prefetch_bucket_size`, as in files of Axolotl."""
    for name, alias in normalize.ZERO_ALIASES.items():
        value = DeepSpeedZeroConfig.model_fields[name].default
        first, second = (loaded(tiny, zero_optimization={"stage": 3, key: value}) for key in (name, alias))
        assert first.resolved() == second.resolved()
        assert alias in first.deepspeed_json["zero_optimization"]
    (problem,) = asked(tiny, zero_optimization={"stage": 3, "max_live_parameters": 1, "stage3_max_live_parameters": 2})
    assert problem.startswith("deepspeed.zero_optimization.max_live_parameters: unknown key")
