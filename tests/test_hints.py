"""Keys of other trainers are reported with our key."""

from __future__ import annotations

from typing import Any

import pytest

from tests.configs import with_values
from trainer.config.changes import changes
from trainer.config.deepspeed.optimizers import optimizer_keys, scheduler_keys
from trainer.config.deepspeed.section import OptimizerSection, SchedulerSection
from trainer.config.hints import TARGETS, hint
from trainer.config.load import check_config
from trainer.config.schema import SECTIONS
from trainer.config.validate import _known_keys_at
from trainer.errors import ConfigError

pytestmark = pytest.mark.fast


def exists(key: str) -> bool:
    section, *path = key.split(".")
    if path[:2] == ["optimizer", "params"]:
        return path[2] in (optimizer_keys(OptimizerSection(type="AdamW"), offload=False) or ())
    if path[:2] == ["scheduler", "params"]:
        kinds = (scheduler_keys(SchedulerSection(type=kind)) or frozenset() for kind in ("WarmupCosineLR", "WSD"))
        return path[2] in frozenset().union(*kinds)
    return path[-1] in _known_keys_at(SECTIONS[section], path[:-1])


@pytest.mark.parametrize("target", sorted(set(TARGETS.values())))
def test_hint_target_exists(target: str) -> None:
    assert exists(target)


def test_exists_is_false_for_unknown_key() -> None:
    assert not any(map(exists, ("training.steps", "deepspeed.optimizer.params.learning_rate", "data.nowhere")))


def problems(config: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_config(config, world_size=1, device="cpu")
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("key", "target"),
    [
        ("training.learning_rate", "deepspeed.optimizer.params.lr"),
        ("training.num_train_epochs", "training.epochs"),
        ("training.gradient_checkpointing", "model.activation_checkpointing"),
        ("checkpoint.save_total_limit", "checkpoint.keep_last"),
        ("training.per_device_train_batch_size", "deepspeed.train_micro_batch_size_per_gpu"),
        ("parallel.tensor_model_parallel_size", "parallel.tensor"),
        ("training.save_steps", "checkpoint.every_steps"),
        ("model.bf16", "deepspeed.bf16.enabled"),
        ("data.sequence_len", "data.sequence_length"),
        ("training.steps", "training.max_steps"),
        ("checkpoint.interval", "checkpoint.every_steps"),
        ("deepspeed.lr", "deepspeed.optimizer.params.lr"),
        ("deepspeed.optimizer.lr", "deepspeed.optimizer.params.lr"),
        ("deepspeed.optimizer.params.learning_rate", "deepspeed.optimizer.params.lr"),
        ("deepspeed.cpu_offload", "deepspeed.zero_optimization.offload_optimizer"),
        ("learning_rate", "deepspeed.optimizer.params.lr"),
        ("parallelism.tensor_parallel_degree", "parallel.tensor"),
        ("optimizer.lr", "deepspeed.optimizer.params.lr"),
    ],
)
def test_foreign_key_is_translated(key: str, target: str, tiny: dict[str, Any]) -> None:
    assert problems(with_values(tiny, **{key.replace(".", "__"): 3})) == [f"{key}: unknown key; that is {target} here"]


def test_unsupported_feature_has_reason(tiny: dict[str, Any]) -> None:
    (problem,) = problems(with_values(tiny, model__lora_r=8))
    assert problem == "model.lora_r: unknown key; adapters are not supported: all weights are trained. Remove it"


def test_hint_never_names_the_key_itself() -> None:
    assert all(hint(target) is None or target not in str(hint(target)).split(": ", 1)[1] for target in TARGETS.values())


def test_misspelling_is_suggested_before_hint(tiny: dict[str, Any]) -> None:
    assert problems(with_values(tiny, training__max_stps=4, training__max_steps=None)) == [
        "training.max_stps: unknown key; did you mean 'max_steps'?"
    ]


def test_changes_lists_differing_values(tiny: dict[str, Any]) -> None:
    old = check_config(tiny, world_size=1, device="cpu").resolved()
    new = with_values(
        tiny,
        deepspeed__optimizer__params__lr=0.004,
        deepspeed__scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 3}},
        checkpoint__resume="never",
    )
    assert list(changes(old, check_config(new, world_size=1, device="cpu").resolved())) == [
        "deepspeed.optimizer.params.lr: 0.002 -> 0.004",
        "deepspeed.scheduler.params.warmup_num_steps: unset -> 3",
        'deepspeed.scheduler.type: unset -> "WarmupLR"',
    ]
    assert list(changes(old, old)) == []
