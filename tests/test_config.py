"""Reading, merging, overriding and resolving configurations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.configs import with_values
from tests.harness import run_command
from tools.configuration_page import configuration_page
from tools.parity.shrink import tiny as tiny_family
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
from trainer.config.model_config import parse_model_config, scrub
from trainer.config.model_facts import model_facts
from trainer.config.model_sizes import relation_problems, size_problems
from trainer.config.read import apply_override, merge, read_config_file
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


def test_extends_merges_objects_and_replaces_lists(tmp_path: Path) -> None:
    (tmp_path / "base.json").write_text('{"a": {"x": 1, "y": 2}, "b": [1, 2], "$schema": "s"}')
    (tmp_path / "middle.json").write_text('{"extends": "base.json", "a": {"y": 3}}')
    (tmp_path / "top.json").write_text('{"extends": "middle.json", "b": [9]}')
    assert read_config_file(tmp_path / "top.json") == {"a": {"x": 1, "y": 3}, "b": [9]}


def test_deepspeed_file_is_merged_into_section(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(tiny["deepspeed"]))
    (tmp_path / "config.json").write_text(json.dumps({**tiny, "deepspeed": "ds.json"}))
    inline = check_config(tiny, world_size=1, device="cpu")
    assert load_config(tmp_path / "config.json", world_size=1, device="cpu").resolved() == inline.resolved()


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("a.b=1", {"a": {"b": 1}}),
        ("a.b=text", {"a": {"b": "text"}}),
        ('a.b="1"', {"a": {"b": "1"}}),
        ("a.b=[1,2]", {"a": {"b": [1, 2]}}),
        ("a.b=x=y", {"a": {"b": "x=y"}}),
        ("list.0.path=z", {"list": [{"path": "z"}]}),
    ],
)
def test_override_sets_value(assignment: str, expected: dict[str, Any]) -> None:
    raw: dict[str, Any] = {"list": [{"path": "a"}]} if "list" in expected else {}
    apply_override(raw, assignment)
    assert raw == expected


@pytest.mark.parametrize("assignment", ["nothing", "=1", "list.5=1", "number.x=1", "extends=x.json"])
def test_malformed_override_is_refused(assignment: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        apply_override({"list": [1], "number": 3}, assignment)


@pytest.mark.parametrize(
    ("assignment", "key", "written"),
    [
        ("deepspeed.optimizer.params.lr=1e999", "deepspeed.optimizer.params.lr", "1e999"),
        ("evaluation.x=-Infinity", "evaluation.x", "-Infinity"),
        ("training.z_loss=NaN", "training.z_loss", "NaN"),
        ("run.seed=1" + "0" * 5000, "run.seed", "10000"),
        ('model.config={"sizes": [1, {"rope_theta": 1e400}]}', "model.config.sizes.1.rope_theta", "1e400"),
    ],
)
def test_non_finite_override_is_refused(assignment: str, key: str, written: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--set {key}: must be a finite number \(got {written}"):
        apply_override({}, assignment)


@pytest.mark.parametrize("text", ["1e308", "123456789012345678901234567890", "-0.0", '"NaN"', "nan"])
def test_override_with_infinite_looking_text_is_string(text: str) -> None:
    raw: dict[str, Any] = {}
    apply_override(raw, f"a={text}")
    assert json.dumps(raw["a"]) in (text.replace("1e308", "1e+308"), '"nan"')


def test_every_malformed_override_is_reported(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "config.json", ["nothing", "=1", "run.seed=3"])
    assert len(caught.value.problems) == 2


def test_override_reads_deepspeed_file(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({**tiny["deepspeed"], "gradient_clipping": 0.125}))
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    loaded = load_config(tmp_path / "config.json", [f"deepspeed={tmp_path / 'ds.json'}"], world_size=1)
    assert loaded.config.deepspeed.clipping == 0.125


def test_merge_does_not_change_arguments() -> None:
    base = {"a": {"x": 1}}
    assert merge(base, {"a": {"y": 2}}) == {"a": {"x": 1, "y": 2}}
    assert base == {"a": {"x": 1}}


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
    for start in ("trakcing:", "parallel.tensr:", "training.max_steps:", "deepspeed.train_batch_size:",
                  "deepspeed.optimizer.type:", "model.config.hidden_sise:", "data.train.0.path:"):  # fmt: skip
        assert sum(line.startswith(start) for line in found) == 1, (start, found)
    assert len(found) == 7


def test_invalid_value_skips_dependent_rules(tiny: dict[str, Any]) -> None:
    assert problems(with_values(tiny, deepspeed__train_batch_size="many")) == [
        "deepspeed.train_batch_size: expected whole number or 'auto', got \"many\""
    ]


def section(**keys: Any) -> DeepSpeedSection:
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
    train: Any, micro: Any, steps: Any, ranks: int, expected: Batch | None
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
            "stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
    )  # fmt: skip
    resolved = check_config(config, world_size=2, device="cpu").deepspeed_json
    assert '"auto"' not in json.dumps(resolved)
    assert resolved["gradient_accumulation_steps"] == 2
    assert resolved["gradient_clipping"] == 1.0
    assert resolved["optimizer"]["params"] == {"lr": 0.003, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    assert resolved["scheduler"]["params"] == {
        "warmup_min_lr": 0.0, "warmup_max_lr": 0.003, "total_num_steps": 4, "warmup_num_steps": 2
    }  # fmt: skip
    zero = resolved["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["stage3_prefetch_bucket_size"]) == (32 * 32, int(0.9 * 32 * 32))
    assert zero["stage3_param_persistence_threshold"] == 320


def _refused_everywhere() -> list[str]:
    """Every nested key of the section that takes no "auto", as a dotted path with a value around it."""
    return ["zero_optimization.stage", "zero_optimization.overlap_comm",
            "zero_optimization.sub_group_size", "steps_per_print", "communication_data_type"]  # fmt: skip


@pytest.mark.parametrize("path", _refused_everywhere())
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


def test_model_config_code_keys_are_dropped_at_every_depth() -> None:
    raw = {"model_type": "llama", "auto_map": {"AutoModel": "evil.Model"}, "_attn_implementation_internal": "evil/repo",
           "text_config": {"trust_remote_code": True, "hidden_size": 3}}  # fmt: skip
    assert scrub(raw) == {"model_type": "llama", "text_config": {"hidden_size": 3}}


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


@pytest.mark.parametrize(("extra", "expected"), [
    ([], ["processes    1 = pipeline 1 x data 1 x tensor 1", "8 samples a step = 2 a micro-batch x 4 accumulated x 1"]),
    (["--world", "4"], ["processes    4 = pipeline 1 x data 4 x tensor 1", "2 a micro-batch x 1 accumulated x 4"]),
    (["--set", "deepspeed.gradient_accumulation_steps=2"], ["processes    2 =", "x 2 data ranks"]),
])  # fmt: skip
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


# --- sizes of a model ------------------------------------------------------------------------------------------------


def sizes_refused(model_type: str, **values: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        parse_model_config({"model_type": model_type, **values}, "model.config")
    return str(raised.value)


@pytest.mark.parametrize(
    ("model_type", "values", "expected"),
    [
        ("gpt2", {"n_layer": 0}, "model.config.n_layer: must be a whole number of at least 1 (got 0)"),
        ("gpt2", {"num_hidden_layers": 0}, "model.config.num_hidden_layers: must be a whole number of at least 1"),
        ("dbrx", {"attn_config": {"kv_n_heads": 0}}, "model.config.attn_config.kv_n_heads: must be a whole number"),
        ("gemma3n_text", {"intermediate_size": [64, 0]}, "intermediate_size: must be a whole number of at least 1"),
        ("gemma3", {"text_config": {"hidden_size": 2.5}}, "model.config.text_config.hidden_size: must be a whole"),
        ("gemma3", {"text_config": {"num_attention_heads": 4, "num_key_value_heads": 3}},
         "model.config.text_config.num_key_value_heads: must divide the 4 attention heads (got 3)"),
        ("mistral", {"hidden_size": 66, "num_attention_heads": 4, "num_key_value_heads": 2},
         "model.config.hidden_size: must be a multiple of the number of attention heads, 4"),
        ("qwen2_moe", {"num_experts": -1}, "model.config.num_experts: must be a whole number of at least 0 (got -1)"),
        ("deepseek_v3", {"n_routed_experts": 4, "n_group": 1, "topk_group": 1},
         "num_experts_per_tok: must be between 1 and the number of experts, 4 (got 8)"),
        ("phi3", {"max_position_embeddings": 0}, "max_position_embeddings: must be a whole number of at least 1"),
        ("llama", {"vocab_size": -5}, "model.config.vocab_size: must be a whole number of at least 1 (got -5)"),
    ],
)  # fmt: skip
def test_impossible_model_size_is_refused(model_type: str, values: dict[str, Any], expected: str) -> None:
    assert expected in sizes_refused(model_type, **values)


@pytest.mark.parametrize(
    ("model_type", "values"),
    [
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 4}),
        ("jamba", {"num_experts": 1}),
        ("qwen2_moe", {"num_experts": 0, "sliding_window": 0, "shared_expert_intermediate_size": 0}),
        ("gemma3n_text", {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}),
        ("granitemoeshared", {"shared_intermediate_size": 0}),
        ("qwen3", {"hidden_size": 66, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8}),
        ("qwen3", {"hidden_size": 66, "num_attention_heads": 4, "num_key_value_heads": 2}),  # its default head_dim
        ("longcat_flash", {"n_routed_experts": 8, "zero_expert_num": 4, "moe_topk": 12}),
        ("llama", {"num_key_value_heads": None, "pad_token_id": -1}),
    ],
)
def test_unusual_model_size_is_accepted(model_type: str, values: dict[str, Any]) -> None:
    parse_model_config({"model_type": model_type, **values}, "model.config")


def test_default_sizes_of_every_family_are_accepted() -> None:
    """Its defaults, written whole as a folder has them."""
    count = 0
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[model_type]()
        except Exception:  # a family without defaults
            continue
        count += 1
        for raw in (config.to_dict(), config.to_diff_dict()):
            problems = [*size_problems(raw, model_type), *relation_problems(config, raw, model_type)]
            assert not problems, problems
    assert count > 150


def test_per_layer_attention_heads_use_common_divisor() -> None:
    """What every layer can be sharded into: 16 heads in two layers, 8 in the others."""
    assert model_facts(tiny_family("dots3_note_text")).attention_heads == 8
    assert model_facts(tiny_family("llama")).attention_heads == 8
    assert model_facts(tiny_family("mamba")).attention_heads is None
